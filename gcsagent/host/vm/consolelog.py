"""A VM's console in a file: written with a bound on its size, and followed by other processes as it grows.

A guest can write to its console for ever. When the file reaches its limit it is renamed to `<name>.1`,
replacing the one before, so at most twice the limit is on disk.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

from gcsagent.host.vm.inotify import DirectoryWatch

LIMIT_BYTES = 8 << 20

_READ_SIZE = 65536


class ConsoleLog:
    """The writing side. A disk that is full costs log, never the VM: the bytes it refuses are dropped."""

    def __init__(self, path: Path, limit: int = LIMIT_BYTES) -> None:
        self.path = path
        self._limit = limit
        self._size = 0
        self._fd = _create(path)

    def write(self, data: bytes) -> None:
        """Appends console bytes."""
        try:
            if self._size + len(data) > self._limit:
                self._rotate()
            self._size += os.write(self._fd, data)
        except OSError:
            return

    def close(self) -> None:
        """Closes the file; it stays."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _rotate(self) -> None:
        os.replace(self.path, previous(self.path))
        # Made first: of a descriptor that is closed the number may soon be somebody else's.
        fresh = _create(self.path)
        os.close(self._fd)
        self._fd, self._size = fresh, 0


def previous(path: Path) -> Path:
    """Where the part before the last rotation is."""
    return path.with_name(f"{path.name}.1")


def read_log(path: Path) -> bytes:
    """Everything that is kept of a console."""
    return b"".join(part.read_bytes() for part in (previous(path), path) if part.exists())


async def follow(path: Path, gone: asyncio.Future[None]) -> AsyncIterator[bytes]:
    """What is kept of a console, then what is added to it until `gone` is done.

    Raises:
        OSError: there is no such log.
    """
    with DirectoryWatch(path.parent) as watch:
        if before := _read(previous(path)):
            yield before
        reader = _Reader(path)
        try:
            while True:
                ended = gone.done()
                while chunk := reader.read():
                    yield chunk
                if ended:
                    return
                await _either(watch, gone)
        finally:
            reader.close()


class _Reader:
    """Reads a log through its rotations."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self) -> bytes:
        chunk = os.read(self._fd, _READ_SIZE)
        return chunk if chunk or not self._reopen() else os.read(self._fd, _READ_SIZE)

    def close(self) -> None:
        os.close(self._fd)

    def _reopen(self) -> bool:
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        if os.path.samestat(os.fstat(fd), os.fstat(self._fd)):
            os.close(fd)
            return False
        os.close(self._fd)
        self._fd = fd
        return True


async def _either(watch: DirectoryWatch, gone: asyncio.Future[None]) -> None:
    changed = asyncio.create_task(watch.changed())
    try:
        await asyncio.wait((changed, gone), return_when=asyncio.FIRST_COMPLETED)
    finally:
        changed.cancel()
        await asyncio.gather(changed, return_exceptions=True)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def _create(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
