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
from collections.abc import Callable, Iterator
from typing import Any

import msgpack

from protocol.schema import from_wire, to_wire
from protocol.types import Event

SEGMENT = 512 * 1024
"""Bytes of one segment: 2,000 events or more, so that the last 2,000 are there at any time."""

_HEADER = 4096
_SIZE = _HEADER + 2 * SEGMENT
_LENGTH = struct.Struct("=I")


class EventLog:
    def __init__(self, fd: int | None = None) -> None:
        """With ``fd``: goes on with an earlier agent's ring."""
        if fd is None:
            fd = os.memfd_create("gcs-events", os.MFD_CLOEXEC)
            os.ftruncate(fd, _SIZE)
        self.fd = fd
        self._memory = mmap.mmap(fd, _SIZE)
        self._committed = memoryview(self._memory).cast("Q")  # words 0 and 1 are the segments' lengths
        self._listeners: list[Callable[[Event], None]] = []
        tails = [self._last_number(0), self._last_number(1)]
        self.last = max(tails)
        self._active = 1 if tails[1] > tails[0] else 0

    def publish(self, kind: str, container: str = "", process: str = "", **data: Any) -> None:
        self.last += 1
        event = Event(self.last, kind, time.time_ns(), container, process, data)
        self._append(event)
        for listener in list(self._listeners):
            listener(event)

    def since(self, after: int) -> tuple[list[Event], int]:
        """Events numbered above ``after``, and how many of those are no longer in the ring."""
        events = [event for event in self.all() if event.seq > after]
        return events, max(0, self.last - after) - len(events)

    def all(self) -> Iterator[Event]:
        """Everything in the ring, oldest first."""
        for segment in (1 - self._active, self._active):
            for record in self._records(segment):
                yield from_wire(Event, msgpack.unpackb(record))

    def listen(self, listener: Callable[[Event], None]) -> Callable[[], None]:
        """Calls ``listener`` with each new event until the returned function is called."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def _append(self, event: Event) -> None:
        record = msgpack.packb(to_wire(event))
        if self._committed[self._active] + _LENGTH.size + len(record) > SEGMENT:
            self._active = 1 - self._active
            self._committed[self._active] = 0
        at = self._committed[self._active]
        start = _HEADER + self._active * SEGMENT + at
        _LENGTH.pack_into(self._memory, start, len(record))
        self._memory[start + _LENGTH.size : start + _LENGTH.size + len(record)] = record
        self._committed[self._active] = at + _LENGTH.size + len(record)

    def _records(self, segment: int) -> Iterator[bytes]:
        base, at, end = _HEADER + segment * SEGMENT, 0, self._committed[segment]
        while at < end:
            (length,) = _LENGTH.unpack_from(self._memory, base + at)
            at += _LENGTH.size
            yield self._memory[base + at : base + at + length]
            at += length

    def _last_number(self, segment: int) -> int:
        last = 0
        for record in self._records(segment):
            last = msgpack.unpackb(record)["seq"]
        return last
