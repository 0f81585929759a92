"""Receives the pty master of a container or exec.

runc connects to the console socket and sends the master with SCM_RIGHTS. It goes straight into the
supervisor's store: an agent that was killed between accepting and storing it would hang up the container.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

from gcsagent.common import channel
from gcsagent.common.loop import Loop

MAX_PATH = 107
"""sun_path is 108 bytes with its NUL (unix(7))."""


class ConsoleSocket:
    """Listens at ``path`` for one connection bearing one descriptor, and calls ``received`` with it."""

    def __init__(self, loop: Loop, path: str, received: Callable[[int], None]) -> None:
        if len(os.fsencode(path)) > MAX_PATH:
            raise ValueError(f"console socket {path}: the path is longer than {MAX_PATH} bytes")
        self._loop, self._path, self._received = loop, path, received
        self._connection: socket.socket | None = None
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            self._listener.bind(path)
            os.chmod(path, 0o600)
            self._listener.listen(1)
        except OSError:
            self._listener.close()
            raise
        loop.watch(self._listener.fileno(), self._accept)

    def _accept(self, _events: int) -> None:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError:
            # No descriptor is to be had: the connection waits in the backlog, and watched it would wake us
            # over and over. :meth:`finish` looks once more.
            self._loop.forget(self._listener.fileno())
            return
        if self._connection is not None:
            connection.close()
            return
        connection.setblocking(False)
        self._connection = connection
        self._loop.watch(connection.fileno(), self._receive)

    def _receive(self, _events: int) -> None:
        assert self._connection is not None
        try:
            _, fds, _ = channel.receive_fds(self._connection, 4096, 1)
        except BlockingIOError:
            return
        except OSError:
            fds = []
        self._drop_connection()
        if fds:
            self._received(fds[0])

    def finish(self) -> None:
        """Takes what runc sent before it exited, then removes the socket. Idempotent."""
        if self._listener.fileno() < 0:
            return
        self._accept(0)
        if self._connection is not None:
            self._receive(0)
        self._drop_connection()
        self._loop.forget(self._listener.fileno())
        self._listener.close()
        try:
            os.unlink(self._path)
        except FileNotFoundError:
            return

    def _drop_connection(self) -> None:
        if self._connection is not None:
            self._loop.forget(self._connection.fileno())
            self._connection.close()
            self._connection = None
