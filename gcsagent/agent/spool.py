"""The bytes of one spool: a file without a name that is as long as the stream, with holes where it was read.

Offset N of the stream is offset N of the file. What is released becomes a hole, so the file takes up no
more room than what is kept; there is no ring, no wrapping and nothing to translate. Two numbers describe
it, and both are exact wherever the agent is killed:

* how much was taken is the position of the one file description that is written through, which the
  supervisor holds: splice(2) moves the bytes out of the pipe, into the file and the position along with
  them, in one system call;
* how much was released is one aligned 8-byte word of the counters' memory.

Who reads has a description of his own, whose position sendfile(2) moves along in the same way.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import struct

from gcsagent.agent.counters import CounterSlots

GRANULE = 64 * 1024
"""Holes begin and end at multiples of this. Pages on their way to a client are the file's own: a whole page
that is taken out of the file keeps its bytes for the client, but the rest of one cut in two would be
zeroed under its eyes. What the page cache keeps in one piece (a large folio) is aligned to its size, and not
larger than the write that made it: hence no more is taken in one splice, though a process may enlarge its
pipe, and (FADV_RANDOM) nothing is read ahead."""

_CHUNK = 64 * 1024
_CHUNKS_A_TURN = 16

_FS_IOC_UNRESVSP64 = 0x4030582B
_SPACE = struct.Struct("=hh4xqqiI4i")
"""struct space_resv of linux/falloc.h: the ioctl is fallocate(2) with FALLOC_FL_PUNCH_HOLE, which the
standard library has no call for."""

_NO_HOLES = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.EISDIR)


def make_file(directory: str) -> int:
    """A file nobody else can open, in the file system of ``directory`` or, if that knows neither nameless
    files nor holes, in memory. It is gone with its last descriptor. Raises OSError."""
    try:
        fd = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            _punch(fd, 0, GRANULE)
        except OSError:
            os.close(fd)
            raise
    except OSError as error:
        if error.errno not in _NO_HOLES:
            raise
        fd = os.memfd_create("gcs-spool", os.MFD_CLOEXEC)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    return fd


class Spool:
    """``fd`` is the description that is written through; nothing else may move its position."""

    def __init__(self, fd: int, counters: CounterSlots, slot: int) -> None:
        """``slot`` counts what was released. With what an earlier agent left: goes on where it was."""
        self.fd = fd
        self._counters, self._slot = counters, slot
        self.written = os.lseek(fd, 0, os.SEEK_CUR)
        self.first = counters.delivered(slot, 0)
        self._hole = 0

    @property
    def kept(self) -> int:
        return self.written - self.first

    def take(self, source: int, count: int) -> int:
        """Moves up to ``count`` bytes (or GRANULE) from the pipe ``source``; 0: the pipe has ended.

        Raises BlockingIOError when the pipe is empty, OSError when the file takes nothing (ENOSPC, EFBIG).
        """
        moved = os.splice(source, self.fd, min(count, GRANULE), flags=os.SPLICE_F_NONBLOCK)
        self.written += moved
        return moved

    def begin_at(self, first: int, source: int, count: int) -> None:
        """Nothing having been taken yet: holds ``count`` bytes of the file ``source`` from offset ``first``.

        Raises OSError.
        """
        os.lseek(self.fd, first, os.SEEK_SET)
        self.written = first
        while count and (moved := os.sendfile(self.fd, source, None, min(count, _CHUNK))):
            self.written, count = self.written + moved, count - moved
        self.release(first)

    def release(self, offset: int) -> None:
        """Gives up what is before ``offset``, which is at most :attr:`written`; :meth:`punch` frees it."""
        if offset > self.first:
            self.first = offset
            self._counters.filling(self._slot, offset)

    def punch(self) -> None:
        """Frees what was released. An agent killed before this frees it with the next."""
        end = self.first - self.first % GRANULE
        if end > self._hole:
            _punch(self.fd, self._hole, end - self._hole)
            self._hole = end

    def reader(self, offset: int) -> int:
        """A description of its own, at ``offset``. Raises OSError."""
        fd = os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        os.lseek(fd, offset, os.SEEK_SET)
        return fd

    async def tail(self, lines: int) -> int:
        """Where the last ``lines`` lines begin, or the oldest byte kept. Lets others run meanwhile."""
        end = self.written
        if lines == 0 or end == self.first:
            return end
        at = end - 1 if os.pread(self.fd, 1, end - 1) == b"\n" else end
        turn = 0
        while at > self.first:
            start = max(self.first, at - _CHUNK)
            data = os.pread(self.fd, at - start, start)
            found = data.count(b"\n")
            if found >= lines:
                return start + _from_the_end(data, lines) + 1
            lines -= found
            at = start
            turn += 1
            if turn % _CHUNKS_A_TURN == 0:
                await asyncio.sleep(0)
        return self.first


def _from_the_end(data: bytes, count: int) -> int:
    """Position of the ``count``-th newline from the end; there are as many."""
    at = len(data)
    for _ in range(count):
        at = data.rindex(b"\n", 0, at)
    return at


def _punch(fd: int, start: int, length: int) -> None:
    fcntl.ioctl(fd, _FS_IOC_UNRESVSP64, _SPACE.pack(0, os.SEEK_SET, start, length, 0, 0, 0, 0, 0, 0))
