"""Reads and writes the descriptors gcsctl was started with, without ever blocking the event loop.

They belong to the shell too: O_NONBLOCK is a property of the open file description, so setting it here would
set it for everybody who shares the terminal or pipe. A pipe or terminal is therefore opened once more
through /proc/self/fd, which makes a description of our own (proc(5)).
"""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from collections.abc import Callable

CHUNK = 65536

_PIPE_BUF = 4096
"""A blocking pipe that polls writable takes this much without blocking (pipe(7))."""


class LocalReader:
    """A descriptor to read from; regular files and devices without poll are read directly."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    async def read(self, size: int = CHUNK) -> bytes:
        """Some bytes, b"" at the end. A terminal that was hung up, or no descriptor at all, is at its end."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                await _until(self._fd, loop.add_reader, loop.remove_reader)
                return os.read(self._fd, size)
            except BlockingIOError:  # of somebody else's making, who was also faster
                continue
            except OSError as error:
                if error.errno in (errno.EIO, errno.EBADF):
                    return b""
                raise


class LocalWriter:
    """A descriptor to write to. ``close`` leaves the one it was given open."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._step = CHUNK
        self._pollable = _is_pollable(fd)
        self._own = _reopened(fd) if self._pollable else None
        if self._own is not None:
            self._fd = self._own
        elif self._pollable:
            self._step = _PIPE_BUF

    async def write(self, data: bytes) -> None:
        """Writes all of it. Raises BrokenPipeError when nobody reads any more, OSError (disk full, …)."""
        rest = memoryview(data)
        loop = asyncio.get_running_loop()
        while rest:
            if self._pollable:
                await _until(self._fd, loop.add_writer, loop.remove_writer)
            try:
                rest = rest[os.write(self._fd, rest[: self._step]) :]
            except BlockingIOError:
                self._pollable = True

    def close(self) -> None:
        if self._own is not None:
            os.close(self._own)
            self._own = None


def _is_pollable(fd: int) -> bool:
    mode = os.fstat(fd).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or (stat.S_ISCHR(mode) and os.isatty(fd))


def _reopened(fd: int) -> int | None:
    """The same pipe or terminal with a description of its own, or None where that cannot be (a socket)."""
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return None


async def _until(fd: int, add: Callable[..., None], remove: Callable[[int], bool]) -> None:
    ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def ring() -> None:
        if not ready.done():
            ready.set_result(None)

    try:
        add(fd, ring)
    except PermissionError:  # epoll_ctl(2), EPERM: a regular file or /dev/null, always ready
        await asyncio.sleep(0)
        return
    try:
        await ready
    finally:
        remove(fd)
