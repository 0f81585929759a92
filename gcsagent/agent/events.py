"""What happened, numbered: a bounded ring to replay from, and whoever listens."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from protocol.types import Event

RING = 4096
"""Events kept for replay: a busy minute of execs, about a megabyte."""


class EventLog:
    def __init__(self, last: int = 0) -> None:
        self._ring: deque[Event] = deque(maxlen=RING)
        self._listeners: list[Callable[[Event], None]] = []
        self.last = last

    def publish(self, kind: str, container: str = "", process: str = "", **data: Any) -> None:
        self.last += 1
        event = Event(self.last, kind, time.time_ns(), container, process, data)
        self._ring.append(event)
        for listener in list(self._listeners):
            listener(event)

    def since(self, after: int) -> tuple[list[Event], int]:
        """Events numbered above ``after``, and how many of those are no longer in the ring."""
        events = [event for event in self._ring if event.seq > after]
        return events, max(0, self.last - after) - len(events)

    def listen(self, listener: Callable[[Event], None]) -> Callable[[], None]:
        """Calls ``listener`` with each new event until the returned function is called."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)
