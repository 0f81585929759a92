"""The events one connection carries: straight out of the ring, as fast as the host takes them.

Nothing is queued for a subscriber but what its connection's buffer may hold. One that falls so far behind
that the ring has lost what it would get next is disconnected: when it comes back, it is told how many it
missed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from gcsagent.agent.events import EventLog
from gcsagent.agent.wire import MAX_UNREAD, Wire
from protocol.methods import EVENT
from protocol.schema import to_wire
from protocol.types import Event

TURN = 64
"""Events looked at before others have their turn."""


class Subscription:
    def __init__(
        self, events: EventLog, wire: Wire, after: int, container: str | None, close: Callable[[str], None]
    ) -> None:
        """Events numbered above ``after``, of one container or of all. ``close`` gets why it must end."""
        self._events, self._wire, self._container, self._close = events, wire, container, close
        self._loop = asyncio.get_running_loop()
        self._next = max(after + 1, events.first)
        self._unsubscribe: Callable[[], None] | None = events.listen(self._on_event)
        self.pump()

    def pump(self) -> None:
        """Sends what there is, as long as there is room."""
        for _ in range(TURN):
            if self._unsubscribe is None or self._next > self._events.last:
                return
            if self._next < self._events.first:
                self._close("the subscriber does not keep up")
                return
            if self._wire.unread > MAX_UNREAD:
                return
            event = self._events.get(self._next)
            self._next += 1
            if self._container in (None, event.container):
                self._wire.write(self._wire.connection.notify(EVENT, to_wire(event)))
        self._loop.call_soon(self.pump)

    def end(self) -> None:
        if self._unsubscribe is not None:
            self._unsubscribe()
            self._unsubscribe = None

    def _on_event(self, _event: Event) -> None:
        self.pump()
