"""A subscription to an agent's events that survives its connection.

It has a connection of its own: a consumer that stops reading holds up nothing but itself, and closing the
connection is how a subscription ends.
"""

from __future__ import annotations

import asyncio
from typing import Self

from gcsagent.host.closing import Closable, Closing
from gcsagent.host.dialogue import Dialogue, despite_losses, greet
from gcsagent.host.errors import AgentSilent, ConnectionLost, EventsMissed
from gcsagent.host.transport import Address
from protocol.errors import RemoteProtocolError
from protocol.families.agent import Welcome
from protocol.families.events import Subscribe, Subscribed
from protocol.framing import Notification
from protocol.methods import EVENT
from protocol.schema import SchemaError, from_wire
from protocol.types import Event

_SUBSCRIBE = "events.subscribe"
_SUBSCRIBE_SECONDS = 15.0


class EventStream(Closing):
    """Async iterator over :class:`protocol.types.Event`, each once, in order of ``seq``; for one task.

    ``dropped`` counts events the agent no longer had when they were asked for (its replay ring is bounded);
    ``last`` is the newest ``seq`` it had when it was subscribed to, 0 before the first event.
    What an event's ``data`` is for its ``type`` is in SPEC.md, Events; the record in a ``process.exited`` is
    ``from_wire(ExitRecord, event.data)`` of :mod:`protocol.schema`.

    Iterating raises ConnectFailed when the agent does not come back, RemoteProtocolError when it breaks the
    contract, ClosedByUs as soon as :meth:`aclose` is called. With ``strict`` it raises EventsMissed, once for
    each gap and before what is behind it; iterating again goes on there. A wait for the next event may be
    cancelled, by ``asyncio.timeout`` for instance: none is lost by that.
    """

    def __init__(
        self, address: Address, wanted: Subscribe, *, timeout: float, client_name: str, strict: bool = False
    ) -> None:
        """Use :meth:`gcsagent.host.client.Client.events`."""
        self._address = address
        self._wanted = wanted
        self._timeout = timeout
        self._client_name = client_name
        self._strict = strict
        self._dialogue: Dialogue | None = None
        self._open = Closable("this subscription")
        self._welcome: Welcome | None = None
        self._after = wanted.after
        self._gap: EventsMissed | None = None
        self.dropped = 0
        self.last = 0

    @classmethod
    async def open(
        cls, address: Address, wanted: Subscribe, *, timeout: float, client_name: str, strict: bool = False
    ) -> Self:
        stream = cls(address, wanted, timeout=timeout, client_name=client_name, strict=strict)
        async for attempt in despite_losses(stream._generation):
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
        try:
            async with self._open():
                async for attempt in despite_losses(self._generation):
                    with attempt:
                        return await self._advance()
        finally:
            if self._open.closed:
                self._drop()
        raise AssertionError("ends only by returning or raising")

    async def aclose(self) -> None:
        """Ends the subscription, and who waits for its next event."""
        self._open.close()
        if not self._open.waiting:
            self._drop()

    async def _advance(self) -> Event:
        if self._dialogue is None:
            await self._subscribe()
        assert self._dialogue is not None
        if self._gap is not None:
            gap, self._gap = self._gap, None
            raise gap
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
        while True:
            dialogue, welcome = await greet(
                self._address, timeout=self._timeout, client_name=self._client_name
            )
            before, self._welcome = self._welcome, welcome
            if before is not None and _is_another(before, welcome):
                self._begin_anew()
            try:
                reply = await _ask(dialogue, Subscribe(self._after, self._wanted.container))
            except BaseException:
                dialogue.close()
                raise
            if self._after is None or self._after <= reply.last:
                break
            dialogue.close()
            self._begin_anew()
        if self._after is None:
            self._after = reply.last
        if reply.dropped > 0:
            self.dropped += reply.dropped
            self._miss(reply.dropped)
        self.last = reply.last
        self._dialogue = dialogue

    def _begin_anew(self) -> None:
        """Another life of the guest or of its supervisor, with numbers of its own: all it has done counts."""
        self._after = 0
        self._miss(0)

    def _miss(self, dropped: int) -> None:
        if self._strict:
            self._gap = self._gap or EventsMissed(dropped)

    def _generation(self) -> int | None:
        return None if self._welcome is None else self._welcome.generation

    def _drop(self) -> None:
        if self._dialogue is not None:
            self._dialogue.close()
            self._dialogue = None


def _is_another(before: Welcome, now: Welcome) -> bool:
    return now.boot_id != before.boot_id or now.generation < before.generation


async def _ask(dialogue: Dialogue, wanted: Subscribe) -> Subscribed:
    try:
        async with asyncio.timeout(_SUBSCRIBE_SECONDS):
            reply: Subscribed = await dialogue.ask(_SUBSCRIBE, wanted)
    except TimeoutError:
        raise AgentSilent(_SUBSCRIBE, _SUBSCRIBE_SECONDS) from None
    if reply.last < 0:
        raise RemoteProtocolError("event", f"the newest event cannot be number {reply.last}")
    return reply


def _event(note: Notification) -> Event | None:
    """The event a notification carries; None for a notification this client does not know."""
    if note.method != EVENT:
        return None
    try:
        return from_wire(Event, note.params)
    except SchemaError as error:
        raise RemoteProtocolError("event", f"the agent's event: {error}") from error
