"""Bytes between a shell and its client's connection; each way stops where nobody takes them.

Held in between is one read each way, but for the end: what there still is when a shell has ended is
all read at once, so that the shell's record can say how much there was.
"""

from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import Callable

from gcsagent.common.loop import READ, WRITE, Loop
from gcsagent.shell.child import Child

CHUNK = 65536
MAX_REST = 1 << 20
"""Bytes read from a shell that has ended: more than the kernel's buffer of a terminal or pipe holds."""

GONE = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR


class Relay:
    """Owns the connection; ``child``'s descriptors are another's, once :meth:`finish` or :meth:`close` has
    returned."""

    def __init__(
        self, loop: Loop, child: Child, sock: socket.socket, first: bytes, gone: Callable[[], None]
    ) -> None:
        """``first`` goes to the client before the child's bytes; ``gone``: it has closed."""
        self._loop, self._sock, self._gone = loop, sock, gone
        self._child, self._source, self._sink = child, child.source, child.sink
        self._out, self._in = bytearray(first), bytearray()
        self._received = 0
        self._ends_at: int | None = None
        self.produced = 0
        """Bytes the child has given."""
        self._update()

    def end_input(self, offset: int) -> None:
        """The child's input, on pipes, ends behind so many bytes of the client's."""
        self._ends_at = offset
        self._end_if_due()
        self._update()

    def finish(self) -> None:
        """The shell has ended: takes what there still is; the connection is the client's to close."""
        while self._source >= 0 and len(self._out) < MAX_REST and self._read():
            pass
        self._drop_child()
        self._in.clear()
        self._update()

    def close(self) -> None:
        self._drop_child()
        if self._sock.fileno() >= 0:
            self._loop.forget(self._sock.fileno())
            self._sock.close()

    def _update(self) -> None:
        if self._sock.fileno() >= 0:
            events = (0 if self._in else READ) | (WRITE if self._out else 0) | select.EPOLLRDHUP
            self._loop.watch(self._sock.fileno(), self._on_sock, events)
        for fd in {self._source, self._sink} - {-1}:
            reading = fd == self._source and not self._out
            writing = fd == self._sink and self._in
            if reading or writing:
                events = (READ if reading else 0) | (WRITE if writing else 0)
                self._loop.watch(fd, self._on_child, events)
            else:  # a terminal nobody has open any more says so without being asked, and without end
                self._loop.forget(fd)

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
                self._received += len(data)
                if self._sink >= 0:
                    self._in += data
                    self._write()
        except BlockingIOError:
            pass
        except OSError:
            self._loop.forget(self._sock.fileno())
            self._gone()
            return
        self._update()

    def _on_child(self, events: int) -> None:
        if self._in:
            self._write()
        if events & ~WRITE and self._source >= 0 and not self._out:
            self._read()
        self._update()

    def _read(self) -> bool:
        """Whether there was something."""
        try:
            data = os.read(self._source, CHUNK)
        except BlockingIOError:
            return False
        except OSError:  # EIO: nobody has the terminal open any more
            data = b""
        if not data:
            self._drop(self._source)
            self._source, self._sink = -1, -1 if self._sink == self._source else self._sink
        self.produced += len(data)
        self._out += data
        return bool(data)

    def _write(self) -> None:
        try:
            del self._in[: os.write(self._sink, self._in)]
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EPIPE):
                raise
            self._in.clear()
        self._end_if_due()

    def _end_if_due(self) -> None:
        if self._ends_at is not None and self._received >= self._ends_at and not self._in:
            self._drop(self._sink)
            self._sink = -1
            self._child.end_input()

    def _drop(self, fd: int) -> None:
        if fd >= 0:
            self._loop.forget(fd)

    def _drop_child(self) -> None:
        for fd in (self._source, self._sink):
            self._drop(fd)
        self._source = self._sink = -1
