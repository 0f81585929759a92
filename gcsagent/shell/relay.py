"""Bytes between a shell's terminal and its client's connection; each way stops where nobody takes them.

Held in between is one read each way, but for the end: what a terminal still has when its shell has ended is
all read at once, so that the shell's record can say how much there was.
"""

from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import Callable

from gcsagent.common.loop import READ, WRITE, Loop

CHUNK = 65536
MAX_REST = 1 << 20
"""Bytes read from a terminal whose shell has ended: more than its kernel buffer holds."""

GONE = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR


class Relay:
    """Owns the connection; ``master`` is another's, until :meth:`finish` or :meth:`close` has returned."""

    def __init__(
        self, loop: Loop, master: int, sock: socket.socket, first: bytes, gone: Callable[[], None]
    ) -> None:
        """``first`` goes to the client before the terminal's bytes; ``gone``: it has closed."""
        self._loop, self._sock, self._gone = loop, sock, gone
        self._master = master
        self._out, self._in = bytearray(first), bytearray()
        self.produced = 0
        """Bytes the terminal has given."""
        self._update()

    def finish(self) -> None:
        """The shell has ended: takes what its terminal still has; the connection is the client's to close."""
        while self._master >= 0 and len(self._out) < MAX_REST and self._read():
            pass
        self._drop_master()
        self._in.clear()
        self._update()

    def close(self) -> None:
        self._drop_master()
        if self._sock.fileno() >= 0:
            self._loop.forget(self._sock.fileno())
            self._sock.close()

    def _update(self) -> None:
        if self._sock.fileno() >= 0:
            events = (0 if self._in else READ) | (WRITE if self._out else 0) | select.EPOLLRDHUP
            self._loop.watch(self._sock.fileno(), self._on_sock, events)
        if self._master >= 0:
            events = (0 if self._out else READ) | (WRITE if self._in else 0)
            if events:
                self._loop.watch(self._master, self._on_master, events)
            else:  # a terminal nobody has open any more says so without being asked, and without end
                self._loop.forget(self._master)

    def _on_sock(self, events: int) -> None:
        try:
            if events & GONE:
                raise ConnectionResetError
            if events & WRITE:
                del self._out[: self._sock.send(self._out)]
            if events & READ:
                data = self._sock.recv(CHUNK)
                if not data:
                    raise ConnectionResetError
                if self._master >= 0:
                    self._in += data
                    self._write()
        except BlockingIOError:
            pass
        except OSError:
            self._loop.forget(self._sock.fileno())
            self._gone()
            return
        self._update()

    def _on_master(self, events: int) -> None:
        if events & WRITE:
            self._write()
        if events & ~WRITE and not self._out:
            self._read()
        self._update()

    def _read(self) -> bool:
        """Whether there was something."""
        try:
            data = os.read(self._master, CHUNK)
        except BlockingIOError:
            return False
        except OSError:  # EIO: nobody has the terminal open any more
            self._drop_master()
            return False
        self.produced += len(data)
        self._out += data
        return bool(data)

    def _write(self) -> None:
        try:
            del self._in[: os.write(self._master, self._in)]
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            self._in.clear()

    def _drop_master(self) -> None:
        if self._master >= 0:
            self._loop.forget(self._master)
            self._master = -1
