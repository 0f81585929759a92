"""Numbered records in a bounded ring that outlives the agent.

The ring is a memfd that the supervisor holds, so that numbers go on and nothing is forgotten when the
agent dies. It is two segments: one is written from its start to its end, then the other is emptied and
written. A record counts once the segment's committed length, one aligned 8-byte word, has been stored
behind it; an agent killed in between leaves bytes that nobody will read.
"""

from __future__ import annotations

import mmap
import os
import struct
from array import array
from typing import Any

import msgpack

_HEADER = 4096
_LENGTH = struct.Struct("=I")


class Ring:
    """Of maps; each has its number as ``seq``."""

    def __init__(self, name: str, fd: int | None, size: int) -> None:
        """With ``fd``: goes on with an earlier agent's ring, whose size is what it is."""
        if fd is None:
            fd = os.memfd_create(name, os.MFD_CLOEXEC)
            os.ftruncate(fd, _HEADER + size)
        self.fd = fd
        whole = os.fstat(fd).st_size
        self._segment = (whole - _HEADER) // 2
        self._memory = mmap.mmap(fd, whole)
        self._words = memoryview(self._memory).cast("Q")  # words 0 and 1 are the segments' lengths
        self._places = [array("I"), array("I")]  # for each segment, where its records begin, in their order
        tails = [self._find_records(0), self._find_records(1)]
        self.last = max(tails)
        self._active = 1 if tails[1] > tails[0] else 0

    @property
    def first(self) -> int:
        """The oldest number that is still there; one more than the last when none is."""
        return self.last + 1 - len(self._places[0]) - len(self._places[1])

    @property
    def mark(self) -> int:
        """A number of the owner's, kept beside the records; 0 at first."""
        return self._words[2]

    @mark.setter
    def mark(self, value: int) -> None:
        self._words[2] = value

    def append(self, record: dict[str, Any]) -> None:
        """``record["seq"]`` is one more than :attr:`last`. What msgpack raises is raised."""
        self._append(msgpack.packb(record))
        self.last += 1

    def get(self, seq: int) -> dict[str, Any]:
        """A number from :attr:`first` to :attr:`last`."""
        record: dict[str, Any] = msgpack.unpackb(self.packed(seq))
        return record

    def packed(self, seq: int) -> bytes:
        behind = self.last - seq
        newer = self._places[self._active]
        if behind < len(newer):
            segment, index = self._active, len(newer) - 1 - behind
        else:
            segment = 1 - self._active
            index = len(self._places[segment]) - 1 - (behind - len(newer))
        start = _HEADER + segment * self._segment + self._places[segment][index]
        (length,) = _LENGTH.unpack_from(self._memory, start)
        start += _LENGTH.size
        return self._memory[start : start + length]

    def dropped(self, after: int) -> int:
        """How many records numbered above ``after`` are no longer in the ring."""
        return max(0, self.first - 1 - after)

    def _append(self, record: bytes) -> None:
        if self._words[self._active] + _LENGTH.size + len(record) > self._segment:
            self._active = 1 - self._active
            self._words[self._active] = 0
            del self._places[self._active][:]
        at = self._words[self._active]
        start = _HEADER + self._active * self._segment + at
        _LENGTH.pack_into(self._memory, start, len(record))
        self._memory[start + _LENGTH.size : start + _LENGTH.size + len(record)] = record
        self._words[self._active] = at + _LENGTH.size + len(record)
        self._places[self._active].append(at)

    def _find_records(self, segment: int) -> int:
        """Notes where they are; the number of the last one, 0 if there is none."""
        base, at, end = _HEADER + segment * self._segment, 0, self._words[segment]
        start = length = 0
        while at < end:
            self._places[segment].append(at)
            (length,) = _LENGTH.unpack_from(self._memory, base + at)
            start = base + at + _LENGTH.size
            at += _LENGTH.size + length
        return int(msgpack.unpackb(self._memory[start : start + length])["seq"]) if length else 0
