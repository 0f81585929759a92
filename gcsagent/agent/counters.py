"""How many bytes each stream has moved, exact whenever the agent dies.

A pump moves bytes source -> middle pipe -> sink, and fills the middle pipe only when it is empty. One
64-bit word per direction says which of the two it is doing and where that started:

    filling    ``mark`` bytes had reached the sink when filling began; what the middle pipe holds is new
    draining   ``mark`` bytes will have reached the sink when the middle pipe is empty

so that the bytes that reached the sink are ``mark`` while filling, and ``mark - FIONREAD(middle pipe)``
while draining, whatever instruction the agent was killed at. The word is stored in one aligned 8-byte
write into a memfd that the supervisor holds.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import termios

SLOTS = 65_536
_SIZE = SLOTS * 8
_INT = struct.Struct("i")


def queued(fd: int) -> int:
    """Bytes in a pipe (or waiting on a terminal): FIONREAD, ioctl_tty(2) and pipe(7)."""
    found: int = _INT.unpack(fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))[0]
    return found


class CounterSlots:
    """The memfd and which of its slots are in use. Slot 0 is never given out: 0 means none."""

    def __init__(self, fd: int | None = None) -> None:
        """With ``fd``: the memfd of an earlier agent, whose used slots :meth:`claim` takes over."""
        if fd is None:
            fd = os.memfd_create("gcs-counters", os.MFD_CLOEXEC)
            os.ftruncate(fd, _SIZE)
        self.fd = fd
        self._words = memoryview(mmap.mmap(fd, _SIZE)).cast("Q")
        self._free: list[int] = []
        self._next = 1

    def allocate(self) -> int:
        """A slot reading 0, filling. Raises OverflowError when all are taken."""
        if self._free:
            slot = self._free.pop()
        elif self._next < SLOTS:
            slot, self._next = self._next, self._next + 1
        else:
            raise OverflowError(f"{SLOTS - 1} streams exist already")
        self._words[slot] = 0
        return slot

    def claim(self, used: set[int]) -> None:
        """Marks the slots an earlier agent's streams still use; to be called before any is allocated."""
        self._next = max(used, default=0) + 1
        self._free = [slot for slot in range(1, self._next) if slot not in used]

    def free(self, slot: int) -> None:
        self._free.append(slot)

    def filling(self, slot: int, mark: int) -> None:
        self._words[slot] = mark << 1

    def draining(self, slot: int, mark: int) -> None:
        self._words[slot] = mark << 1 | 1

    def delivered(self, slot: int, in_middle: int) -> int:
        """Bytes that have reached the sink, given what the middle pipe holds now."""
        word = self._words[slot]
        return (word >> 1) - (in_middle if word & 1 else 0)
