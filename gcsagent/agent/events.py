"""What happened, numbered: a bounded ring to replay from, and whoever listens.

The ring is a memfd that the supervisor holds, so that numbers go on and nothing is forgotten when the
agent dies. It is two segments: one is written from its start to its end, then the other is emptied and
written. A record counts once the segment's committed length, one aligned 8-byte word, has been stored
behind it; an agent killed in between leaves bytes that nobody will read.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgpack

from protocol.schema import from_wire, to_wire
from protocol.types import Event

DEFAULT_SIZE = 1 << 20
"""Bytes of the ring: 4,000 events or more, so that the last 2,000 are there at any time."""

_HEADER = 4096
_LENGTH = struct.Struct("=I")


class EventLog:
    def __init__(self, fd: int | None = None, size: int = DEFAULT_SIZE) -> None:
        """With ``fd``: goes on with an earlier agent's ring, whose size is what it is."""
        if fd is None:
            fd = os.memfd_create("gcs-events", os.MFD_CLOEXEC)
            os.ftruncate(fd, _HEADER + size)
        self.fd = fd
        whole = os.fstat(fd).st_size
        self._segment = (whole - _HEADER) // 2
        self._memory = mmap.mmap(fd, whole)
        self._committed = memoryview(self._memory).cast("Q")  # words 0 and 1 are the segments' lengths
        self._listeners: list[Callable[[Event], None]] = []
        self._places = [array("I"), array("I")]  # for each segment, where its records begin, in their order
        tails = [self._find_records(0), self._find_records(1)]
        self.last = max(tails)
        self._active = 1 if tails[1] > tails[0] else 0

    @property
    def first(self) -> int:
        """The oldest number that is still there; one more than the last when none is."""
        return self.last + 1 - len(self._places[0]) - len(self._places[1])

    def publish(self, kind: str, /, container: str = "", process: str = "", **data: Any) -> None:
        self.last += 1
        event = Event(self.last, kind, time.time_ns(), container, process, data)
        self._append(event)
        for listener in list(self._listeners):
            listener(event)

    def get(self, seq: int) -> Event:
        """A number from :attr:`first` to :attr:`last`."""
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
        event: Event = from_wire(Event, msgpack.unpackb(self._memory[start : start + length]))
        return event

    def all(self) -> Iterator[Event]:
        """Everything in the ring, oldest first."""
        return map(self.get, range(self.first, self.last + 1))

    def dropped(self, after: int) -> int:
        """How many events numbered above ``after`` are no longer in the ring."""
        return max(0, self.first - 1 - after)

    def listen(self, listener: Callable[[Event], None]) -> Callable[[], None]:
        """Calls ``listener`` with each new event until the returned function is called."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def _append(self, event: Event) -> None:
        record = msgpack.packb(to_wire(event))
        if self._committed[self._active] + _LENGTH.size + len(record) > self._segment:
            self._active = 1 - self._active
            self._committed[self._active] = 0
            del self._places[self._active][:]
        at = self._committed[self._active]
        start = _HEADER + self._active * self._segment + at
        _LENGTH.pack_into(self._memory, start, len(record))
        self._memory[start + _LENGTH.size : start + _LENGTH.size + len(record)] = record
        self._committed[self._active] = at + _LENGTH.size + len(record)
        self._places[self._active].append(at)

    def _find_records(self, segment: int) -> int:
        """Notes where they are; the number of the last one, 0 if there is none."""
        base, at, end = _HEADER + segment * self._segment, 0, self._committed[segment]
        start = length = 0
        while at < end:
            self._places[segment].append(at)
            (length,) = _LENGTH.unpack_from(self._memory, base + at)
            start = base + at + _LENGTH.size
            at += _LENGTH.size + length
        return int(msgpack.unpackb(self._memory[start : start + length])["seq"]) if length else 0


def of_this_life(container: str, events: Iterable[Event], kind: str) -> list[Event]:
    """Those of a kind about the container that is there now, and not about an earlier one of that id."""
    found: list[Event] = []
    for event in events:
        if event.container != container:
            continue
        if event.type in ("container.created", "container.deleted"):
            found.clear()
        elif event.type == kind:
            found.append(event)
    return found
