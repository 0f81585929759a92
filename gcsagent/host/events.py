"""A subscription to an agent's events that survives its connection.

It has a connection of its own: a consumer that stops reading holds up nothing but itself, and closing the
connection is how a subscription ends.
"""

from __future__ import annotations

import asyncio
from typing import Self

from gcsagent.host.closing import Closing
from gcsagent.host.dialogue import Dialogue, despite_losses, greet
from gcsagent.host.errors import AgentSilent, ClosedByUs, ConnectionLost
from gcsagent.host.transport import Address
from protocol.errors import RemoteProtocolError
from protocol.families.events import Subscribe, Subscribed
from protocol.framing import Notification
from protocol.methods import EVENT
from protocol.schema import SchemaError, from_wire
from protocol.types import Event

_SUBSCRIBE = "events.subscribe"
_SUBSCRIBE_SECONDS = 15.0


class EventStream(Closing):
    """Async iterator over :class:`protocol.types.Event`, each once, in order of ``seq``.

    ``dropped`` counts events the agent no longer had when they were asked for (its replay ring is bounded);
    ``last`` is the newest ``seq`` it had when it was subscribed to, 0 before the first event.
    Iterating raises ConnectFailed when the agent does not come back, RemoteProtocolError when it breaks the
    contract, ClosedByUs after :meth:`aclose`.
    """

    def __init__(self, address: Address, wanted: Subscribe, timeout: float, client_name: str) -> None:
        """Use :meth:`gcsagent.host.client.Client.events`."""
        self._address = address
        self._wanted = wanted
        self._timeout = timeout
        self._client_name = client_name
        self._dialogue: Dialogue | None = None
        self._closed = False
        self._generation: int | None = None
        self._after = wanted.after
        self.dropped = 0
        self.last = 0

    @classmethod
    async def open(cls, address: Address, wanted: Subscribe, *, timeout: float, client_name: str) -> Self:
        stream = cls(address, wanted, timeout, client_name)
        async for attempt in despite_losses(lambda: stream._generation):
            with attempt:
                await stream._subscribe()
                return stream
        raise AssertionError("ends only by returning or raising")

    @property
    def position(self) -> int:
        """The ``seq`` beyond which events are still to come."""
        return self._after or 0

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        async for attempt in despite_losses(lambda: self._generation):
            with attempt:
                return await self._advance()
        raise AssertionError("ends only by returning or raising")

    async def aclose(self) -> None:
        """Ends the subscription."""
        self._closed = True
        self._drop()

    async def _advance(self) -> Event:
        if self._closed:
            raise ClosedByUs("this subscription has been closed")
        if self._dialogue is None:
            await self._subscribe()
        assert self._dialogue is not None
        try:
            while True:
                event = _event(await self._dialogue.notification())
                if event is not None and (self._after is None or event.seq > self._after):
                    self._after = event.seq
                    return event
        except (ConnectionLost, RemoteProtocolError):
            self._drop()
            raise

    async def _subscribe(self) -> None:
        dialogue, welcome = await greet(self._address, timeout=self._timeout, client_name=self._client_name)
        self._generation = welcome.generation
        try:
            async with asyncio.timeout(_SUBSCRIBE_SECONDS):
                reply: Subscribed = await dialogue.ask(
                    _SUBSCRIBE, Subscribe(self._after, self._wanted.container)
                )
        except BaseException as error:
            dialogue.close()
            if isinstance(error, TimeoutError):
                raise AgentSilent(_SUBSCRIBE, _SUBSCRIBE_SECONDS) from None
            raise
        # A newest number below ours means that the numbering began anew.
        if self._after is None or reply.last < self._after:
            self._after = reply.last
        self.dropped += reply.dropped
        self.last = reply.last
        self._dialogue = dialogue

    def _drop(self) -> None:
        if self._dialogue is not None:
            self._dialogue.close()
            self._dialogue = None


def _event(note: Notification) -> Event | None:
    """The event a notification carries; None for a notification this client does not know."""
    if note.method != EVENT:
        return None
    try:
        return from_wire(Event, note.params)
    except SchemaError as error:
        raise RemoteProtocolError("event", f"the agent's event: {error}") from error
