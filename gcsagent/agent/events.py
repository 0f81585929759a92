"""What happened, numbered: a ring to replay from, and whoever listens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from gcsagent.agent.ring import Ring
from protocol.schema import from_wire, to_wire
from protocol.types import Event

DEFAULT_SIZE = 1 << 20
"""Bytes of the ring: 4,000 events or more, so that the last 2,000 are there at any time."""


class EventLog:
    def __init__(self, fd: int | None = None, size: int = DEFAULT_SIZE) -> None:
        """With ``fd``: goes on with an earlier agent's ring, whose size is what it is."""
        self._ring = Ring("gcs-events", fd, size)
        self.fd = self._ring.fd
        self._listeners: list[Callable[[Event], None]] = []

    @property
    def first(self) -> int:
        """The oldest number that is still there; one more than the last when none is."""
        return self._ring.first

    @property
    def last(self) -> int:
        return self._ring.last

    def publish(self, kind: str, /, container: str = "", process: str = "", **data: Any) -> None:
        event = Event(self._ring.last + 1, kind, time.time_ns(), container, process, data)
        self._ring.append(to_wire(event))
        for listener in list(self._listeners):
            listener(event)

    def get(self, seq: int) -> Event:
        """A number from :attr:`first` to :attr:`last`."""
        event: Event = from_wire(Event, self._ring.get(seq))
        return event

    def all(self) -> Iterator[Event]:
        """Everything in the ring, oldest first."""
        return map(self.get, range(self.first, self.last + 1))

    def dropped(self, after: int) -> int:
        """How many events numbered above ``after`` are no longer in the ring."""
        return self._ring.dropped(after)

    def listen(self, listener: Callable[[Event], None]) -> Callable[[], None]:
        """Calls ``listener`` with each new event until the returned function is called."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)


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
