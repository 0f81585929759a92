"""Waits for changes in a directory, through inotify(7): the standard library has no binding."""

from __future__ import annotations

import asyncio
import ctypes
import os
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)

# sys/inotify.h
_IN_MODIFY = 0x2
_IN_MOVED_TO = 0x80
_IN_CREATE = 0x100
_IN_DELETE = 0x200
_IN_DELETE_SELF = 0x400
_IN_ONLYDIR = 0x01000000
_MASK = _IN_MODIFY | _IN_MOVED_TO | _IN_CREATE | _IN_DELETE | _IN_DELETE_SELF | _IN_ONLYDIR

_READ_SIZE = 65536


class DirectoryWatch:
    """Tells that a directory has changed: something created, written, renamed or removed.

    What it was, the caller finds out. Changes are remembered from construction on, so the pattern is:
    watch, look, wait, look again.
    """

    def __init__(self, directory: Path) -> None:
        """Starts watching.

        Raises:
            OSError: no such directory, or the user's inotify limits are used up.
        """
        self._fd = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise _error(directory)
        if _libc.inotify_add_watch(self._fd, os.fsencode(directory), _MASK) < 0:
            error = _error(directory)
            os.close(self._fd)
            raise error
        self._changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._fd, self._on_readable)

    def __enter__(self) -> DirectoryWatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def changed(self) -> None:
        """Returns once something has changed since the last call."""
        await self._changed.wait()
        self._changed.clear()

    def close(self) -> None:
        """Stops watching."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _on_readable(self) -> None:
        os.read(self._fd, _READ_SIZE)
        self._changed.set()


def _error(directory: Path) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), str(directory))
