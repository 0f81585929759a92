"""``events.*``: what happened, and what happens."""

from __future__ import annotations

from protocol import checks
from protocol.dataclass import dataclass
from protocol.method import QUICK, Method


@dataclass(frozen=True, slots=True)
class Subscribe:
    """Events with a sequence number above ``after`` are replayed first; without it, only new ones come."""

    after: checks.Offset | None = None
    """Replay what the ring still holds with a greater ``seq``; absent, only new events come."""
    container: checks.Id | None = None
    """Only events of this container."""


@dataclass(frozen=True, slots=True)
class Subscribed:
    """``dropped``: events after ``after`` that had left the ring; ``last``: newest seq at this moment."""

    last: int
    """Newest ``seq`` at this moment; 0 before the first event."""
    dropped: int
    """How many events after ``after`` had already left the ring."""


METHODS = (Method("events.subscribe", Subscribe, Subscribed, QUICK),)
