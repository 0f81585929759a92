"""When the bytes of a spool were written: a bounded list of (offset, time) beside them.

An entry says that the bytes from its offset to the next entry's were written up to its time, so that a
search never begins too late. Writes close together share an entry. A full list loses entries of bytes
that are gone, and then every other one of its older half: what is old is known less finely.

The list is in a memfd that the supervisor holds, in two halves, one of them in use. One aligned 8-byte word
says which half and how many entries; what an agent was writing beside it when it was killed does not count.
"""

from __future__ import annotations

import mmap
import os

ENTRIES = 4096
SHARED_NS = 1_000_000
"""Writes within so many nanoseconds of an entry's first share it."""

_SIZE = 8 * (1 + 2 * 2 * ENTRIES)
_COUNT = (1 << 32) - 1


class SpoolIndex:
    def __init__(self, fd: int | None = None) -> None:
        """With ``fd``: goes on with an earlier agent's."""
        if fd is None:
            fd = os.memfd_create("gcs-spool-index", os.MFD_CLOEXEC)
            os.ftruncate(fd, _SIZE)
        self.fd = fd
        self._memory = mmap.mmap(fd, _SIZE)
        self._words = memoryview(self._memory).cast("Q")
        self._begun_ns = -SHARED_NS

    def note(self, offset: int, time_ns: int, first: int) -> None:
        """Bytes from ``offset`` on are written now; those before ``first`` are gone."""
        half, count = self._in_use()
        if count and 0 <= time_ns - self._begun_ns < SHARED_NS:
            self._words[self._at(half, count - 1) + 1] = time_ns
            return
        if count == ENTRIES:
            half, count = self._thin_out(half, first)
        at = self._at(half, count)
        self._words[at], self._words[at + 1] = offset, time_ns
        self._words[0] = half << 32 | (count + 1)
        self._begun_ns = time_ns

    def since(self, time_ns: int) -> int | None:
        """The offset of the first bytes written at ``time_ns`` or later; None: there are none."""
        return next((offset for offset, time in self.entries() if time >= time_ns), None)

    def entries(self) -> list[tuple[int, int]]:
        half, count = self._in_use()
        start = self._at(half, 0)
        words = self._words[start : start + 2 * count].tolist()
        return list(zip(words[::2], words[1::2], strict=True))

    def close(self) -> None:
        self._words.release()
        self._memory.close()
        os.close(self.fd)

    def _in_use(self) -> tuple[int, int]:
        word = self._words[0]
        return word >> 32, word & _COUNT

    def _at(self, half: int, entry: int) -> int:
        return 1 + 2 * (half * ENTRIES + entry)

    def _thin_out(self, half: int, first: int) -> tuple[int, int]:
        """Copies what is worth keeping to the other half, which is in use from then on."""
        entries = self.entries()
        gone = sum(following <= first for following, _ in entries[1:])
        entries = entries[gone:]
        if len(entries) > ENTRIES // 2:
            older = len(entries) // 2 & ~1
            merged = [(entries[at][0], entries[at + 1][1]) for at in range(0, older, 2)]
            entries = merged + entries[older:]
        half = 1 - half
        for number, (offset, time_ns) in enumerate(entries):
            at = self._at(half, number)
            self._words[at], self._words[at + 1] = offset, time_ns
        self._words[0] = half << 32 | len(entries)
        return half, len(entries)
