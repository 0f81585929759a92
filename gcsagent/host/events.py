"""A subscription to an agent's events that survives its connection.

It has a connection of its own: a consumer that stops reading holds up nothing but itself, and closing the
connection is how a subscription ends.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

from gcsagent.host.dialogue import Dialogue, greet
from gcsagent.host.errors import ClosedByPeer, ClosedByUs, ConnectionBroken
from gcsagent.host.transport import Address
from protocol.errors import RemoteProtocolError
from protocol.methods import EVENT, Subscribe, Subscribed
from protocol.schema import SchemaError, from_wire
from protocol.types import Event

_SUBSCRIBE_SECONDS = 15.0


class EventStream:
    """Async iterator over :class:`protocol.types.Event`, each once, in order of ``seq``.

    ``dropped`` counts events the agent no longer had when they were asked for (its replay ring is bounded).
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
        self.last = wanted.after or 0
        self.dropped = 0

    @classmethod
    async def open(cls, address: Address, wanted: Subscribe, *, timeout: float, client_name: str) -> Self:
        stream = cls(address, wanted, timeout, client_name)
        await stream._subscribe()
        return stream

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        while True:
            try:
                event = await self._next()
            except (ClosedByPeer, ConnectionBroken):
                self._drop()
                await self._subscribe()
                continue
            if event.seq > self.last:
                self.last = event.seq
                return event

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Ends the subscription."""
        self._closed = True
        self._drop()

    async def _next(self) -> Event:
        if self._closed or self._dialogue is None:
            raise ClosedByUs("this subscription has been closed")
        while True:
            note = await self._dialogue.notification()
            if note.method == EVENT:
                try:
                    return from_wire(Event, note.params)
                except SchemaError as error:
                    raise RemoteProtocolError("event", f"the agent's event: {error}") from error

    async def _subscribe(self) -> None:
        first = self._dialogue is None and self.last == (self._wanted.after or 0)
        dialogue, _ = await greet(self._address, timeout=self._timeout, client_name=self._client_name)
        try:
            async with asyncio.timeout(_SUBSCRIBE_SECONDS):
                after = self._wanted.after if first else self.last
                reply: Subscribed = await dialogue.ask(
                    "events.subscribe", Subscribe(after, self._wanted.container)
                )
        except BaseException:
            dialogue.close()
            raise
        self._dialogue = dialogue
        self.dropped += reply.dropped

    def _drop(self) -> None:
        if self._dialogue is not None:
            self._dialogue.close()
            self._dialogue = None
