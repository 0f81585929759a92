"""One host connection: reads requests, runs them side by side, writes answers as they come.

Everything about the wire is :class:`protocol.connection.Connection`'s, moving its bytes
:mod:`gcsagent.agent.wire`'s; this module decodes arguments by the method table and gives each request its
deadline.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import socket
from typing import Any, Protocol

from gcsagent import __version__
from gcsagent.agent import room
from gcsagent.agent.call import Call
from gcsagent.agent.dispatch import Dispatcher
from gcsagent.agent.failures import to_rpc_error
from gcsagent.agent.features import features
from gcsagent.agent.info import AgentService
from gcsagent.agent.logs import ContextLogger, context
from gcsagent.agent.registry import Registry
from gcsagent.agent.streams_attach import AttachStream
from gcsagent.agent.subscription import Subscription
from gcsagent.agent.takeover import Takeover
from gcsagent.agent.wire import Wire
from protocol import PROTOCOL_MAX, PROTOCOL_MIN
from protocol.errors import Code, LocalProtocolError, RemoteProtocolError, RpcError
from protocol.families.agent import Hello, Pong, Welcome
from protocol.families.archive import GetArchive, PutArchive
from protocol.families.events import Subscribe, Subscribed
from protocol.families.stream import Attach
from protocol.framing import Message, Notification, Request, Response, encode
from protocol.method import Envelope
from protocol.methods import CANCEL, ELSEWHERE, METHODS, STREAMING, Cancel
from protocol.schema import SchemaError, depth_of, from_wire, to_wire

PING = "agent.ping"

_log = logging.getLogger("agent.session")

_numbers = itertools.count(1)
"""Of connections. A number keeps nothing alive of one that is gone while its requests go on."""


class Guests(Protocol):
    """Who lets connections in, and counts them."""

    def admit(self, session: Session) -> None:
        """Raises RESOURCE_EXHAUSTED when there are too many."""

    def gone(self, session: Session) -> None:
        """It is gone, or has become a stream's."""


class Session:
    def __init__(
        self,
        sock: socket.socket,
        peer: str,
        dispatcher: Dispatcher,
        registry: Registry,
        agent: AgentService,
        guests: Guests,
    ) -> None:
        self._dispatcher, self._registry, self._agent = dispatcher, registry, agent
        self._guests, self._bounds = guests, registry.bounds
        self._number = next(_numbers)
        self._calls: dict[int, Call] = {}
        self._pings: list[int] = []
        self._pinged = 0.0
        self._closing = False
        self._subscription: Subscription | None = None
        self._takeover: tuple[Takeover, int] | None = None
        self._lending: tuple[Request, PutArchive | GetArchive, Envelope] | None = None
        self._log = context(_log, peer=peer)
        self._wire = Wire(sock, self._bounds, self)
        self._room = room.Room(lambda: self._wire.unread)
        self._connection = self._wire.connection

    # -- the connection -------------------------------------------------------------------------

    def on_message(self, message: Message) -> None:
        if isinstance(message, Request):
            self._on_request(message)
        elif isinstance(message, Notification):
            self._on_notification(message)

    def on_breach(self, error: RemoteProtocolError) -> None:
        self._log.warning("protocol error", extra={"kind": error.kind, "error": error.message})
        self._wire.write(self._connection.farewell(error))
        self.close("protocol error")

    def on_drained(self) -> None:
        self._room.look_again()
        if self._takeover is not None:
            self._hand_over()
        elif self._lending is not None:
            self._lend()
        elif self._subscription is not None:
            self._subscription.pump()

    def close(self, reason: str) -> None:
        """Ends the connection. Requests that only wait are dropped; those that change things go on."""
        if self._closing:
            return
        self._closing = True
        self._log.debug("connection closed", extra={"reason": reason})
        self._connection.close()
        self._let_go()
        self._wire.sock.close()
        if self._takeover is not None:
            self._takeover[0].drop()
            self._takeover = None
        for call in list(self._calls.values()):
            if not METHODS[call.method].mutating:
                call.abort(RpcError(Code.CANCELLED, "the connection was closed"))

    def _let_go(self) -> None:
        self._wire.let_go()
        if self._subscription is not None:
            self._subscription.end()
            self._subscription = None
        self._guests.gone(self)

    # -- requests -------------------------------------------------------------------------------

    def _on_request(self, request: Request) -> None:
        try:
            if self._lending is not None:
                raise _not_alone()
            method = METHODS.get(request.method)
            if method is None:
                raise RpcError(Code.UNIMPLEMENTED, f"there is no method {request.method[:64]!r}")
            if request.method in ELSEWHERE:
                raise RpcError(
                    Code.UNIMPLEMENTED,
                    "this is the agent's port; the debug shell has one of its own, if gcs.shell=on"
                    " (gcsagent --shell) allows it",
                )
            self._bounds.check_request(len(self._calls) + len(self._pings))
            try:
                envelope = from_wire(Envelope, request.params)
                params: Any = from_wire(method.params, request.params)
            except SchemaError as error:
                raise RpcError(
                    Code.INVALID_ARGUMENT, f"{request.method}: {error}", field=error.field
                ) from error
            if request.method == PING:
                self._ping(request.msgid)
            else:
                self._begin(request, params, envelope)
        except RpcError as error:
            self._registry.traffic.count(request.method, error)
            self._answer(request.msgid, error)

    def _begin(self, request: Request, params: Any, envelope: Envelope) -> None:
        match params:
            case Hello():
                self._connection.next_message()  # raises when something has come behind it
                result = self._hello(params)
                self._registry.traffic.count(request.method, result)
                self._answer(request.msgid, result)
            case Attach():
                self._attach(request.msgid, params)
                self._registry.traffic.count(request.method)
            case Subscribe():
                self._subscribe(request.msgid, params)
                self._registry.traffic.count(request.method)
            case PutArchive() | GetArchive():
                self._start_lending(request, params, envelope)
                self._registry.traffic.count(request.method)
            case _ if request.method in STREAMING:
                self._check_alone()
                call = self._new_call(request, params, envelope)
                self._dispatcher.open(call, params, lambda found: self._opened(request.msgid, found))
            case _:
                call = self._new_call(request, params, envelope)
                self._dispatcher.run(
                    call, request.params, params, envelope, lambda result: self._finish(request.msgid, result)
                )

    def _ping(self, msgid: int) -> None:
        """Answered by way of the event loop, so that a busy one shows; all that came together at once."""
        if not self._pings:
            self._pinged = self._wire.turn_began
            asyncio.get_running_loop().call_soon(self._answer_pings)
        self._pings.append(msgid)
        self._bounds.in_flight += 1

    def _answer_pings(self) -> None:
        pings, self._pings = self._pings, []
        self._bounds.in_flight -= len(pings)
        self._registry.traffic.count(PING, times=len(pings))
        self._registry.traffic.took(PING, self._pinged, len(pings))
        if not self._closing:
            pong, respond = self._agent.pong(self._pinged), self._connection.respond
            wire, depth = to_wire(pong), depth_of(Pong)
            self._wire.write(b"".join([respond(msgid, wire, depth) for msgid in pings]))

    def _new_call(self, request: Request, params: Any, envelope: Envelope) -> Call:
        deadline = envelope.deadline_ms or METHODS[request.method].deadline_ms
        log = functools.partial(_log_of, request.method, envelope, params)
        call = self._calls[request.msgid] = Call(request.method, deadline, log)
        call.asked_by = self._number
        size = room.wanted(self._registry, request.method, params)
        if size:
            call.before = functools.partial(self._reserve, call, size)
        self._bounds.in_flight += 1
        return call

    async def _reserve(self, call: Call, size: int) -> None:
        await self._room.reserve(size)
        call.reserved = size

    def _finish(self, msgid: int, result: Any) -> None:
        call = self._calls.pop(msgid, None)
        if not self._closing:
            self._answer(msgid, result)
        if call is not None:
            self._bounds.in_flight -= 1
            if call.reserved:
                self._room.release(call.reserved)
            self._registry.traffic.count(call.method, result)
            self._registry.traffic.took(call.method, call.started)
            if call.afterwards is not None:
                call.afterwards()

    def _answer(self, msgid: int, result: Any) -> None:
        """Sends a result, or the error that ``result`` is."""
        try:
            if isinstance(result, RpcError):
                frame = self._connection.fail(msgid, result)
            else:
                frame = self._connection.respond(msgid, to_wire(result), depth_of(type(result)))
        except LocalProtocolError as error:  # larger than a frame may be
            frame = self._connection.fail(msgid, RpcError(Code.RESOURCE_EXHAUSTED, f"the answer {error}"))
        self._wire.write(frame)

    def _on_notification(self, note: Notification) -> None:
        if note.method != CANCEL:
            return  # unknown notifications are how the contract grows
        try:
            msgid = from_wire(Cancel, note.params).msgid
        except SchemaError as error:
            raise RemoteProtocolError("malformed", f"{CANCEL}: {error}") from error
        call = self._calls.get(msgid)
        if call is not None:
            call.abort(RpcError(Code.CANCELLED, f"{call.method} was cancelled"))

    # -- what changes the connection itself -------------------------------------------------------

    def _hello(self, hello: Hello) -> Welcome | RpcError:
        chosen = min(hello.protocol_max, PROTOCOL_MAX)
        if chosen < max(hello.protocol_min, PROTOCOL_MIN):
            return RpcError(
                Code.FAILED_PRECONDITION,
                f"this agent speaks protocol {PROTOCOL_MIN} to {PROTOCOL_MAX}, the client"
                f" {hello.protocol_min} to {hello.protocol_max}: one of them must be updated",
            )
        try:
            self._guests.admit(self)
        except RpcError as error:
            return error
        self._log.debug("hello", extra={"client": hello.client[:64]})
        return Welcome(
            chosen,
            __version__,
            self._agent.boot_id,
            self._agent.generation,
            features(),
            self._bounds.limits,
        )

    def _subscribe(self, msgid: int, params: Subscribe) -> None:
        if self._subscription is not None:
            self._subscription.end()
        events = self._registry.events
        after = params.after if params.after is not None else events.last
        self._answer(msgid, Subscribed(events.last, events.dropped(after)))
        self._subscription = Subscription(events, self._wire, after, params.container, self.close)

    def _check_alone(self) -> None:
        """Whether this connection can become a stream. Raises RpcError, or what was wrong behind it."""
        self._connection.next_message()  # raises when something has come behind the request
        if self._subscription is not None:
            raise RpcError(
                Code.FAILED_PRECONDITION, "this connection carries events; attach on one of its own"
            )

    def _attach(self, msgid: int, params: Attach) -> None:
        self._check_alone()
        takeover = AttachStream(self._registry, params)
        takeover.result()
        self._take_over(msgid, takeover)

    def _opened(self, msgid: int, found: Takeover | RpcError) -> None:
        if isinstance(found, RpcError):
            self._finish(msgid, found)
            return
        call = self._calls.pop(msgid)
        self._bounds.in_flight -= 1
        self._registry.traffic.count(call.method)
        self._registry.traffic.took(call.method, call.started)
        if self._closing:
            found.drop()
        else:
            self._take_over(msgid, found)

    def _take_over(self, msgid: int, takeover: Takeover) -> None:
        self._takeover = (takeover, msgid)
        if not self._wire.unread:
            self._hand_over()

    def _hand_over(self) -> None:
        """The connection becomes the stream's, which answers first; this session ends without closing it."""
        assert self._takeover is not None
        takeover, msgid = self._takeover
        self._takeover = None
        if self._closing:
            takeover.drop()
            return
        try:
            result = takeover.result()
        except RpcError as error:  # it changed while earlier answers were on their way out
            takeover.drop()
            self._answer(msgid, error)
            return
        reply = self._connection.respond(msgid, to_wire(result))
        full = RpcError(Code.RESOURCE_EXHAUSTED, "the supervisor cannot hold another stream's connection")
        refusal = encode(Response(msgid, full.to_wire(), None))
        self._closing = True
        self._let_go()
        try:
            takeover.take(self._wire.sock, reply, refusal)
        except OSError as error:  # out of descriptors, before the reply was on its way
            self._log.error("cannot attach", extra={"error": str(error)})
            takeover.drop()
            self._wire.sock.close()

    def _start_lending(self, request: Request, params: PutArchive | GetArchive, envelope: Envelope) -> None:
        if self._calls or self._pings or self._subscription is not None or self._connection.unfinished:
            raise _not_alone()
        if self._agent.stopping:
            raise RpcError(Code.UNAVAILABLE, "the agent is going down: its containers are being stopped")
        refusal = self._registry.quiet.refusal(request.method)
        if refusal is not None and isinstance(params, PutArchive):
            raise refusal
        self._registry.archives.check(params)
        self._lending = (request, params, envelope)
        if not self._wire.unread:
            self._lend()

    def _lend(self) -> None:
        """The connection becomes an archiver's, which answers; this session ends without closing it."""
        assert self._lending is not None
        (request, params, envelope), self._lending = self._lending, None
        if self._closing:
            return
        seconds = None if envelope.deadline_ms is None else envelope.deadline_ms / 1000
        try:
            if self._connection.unfinished:
                raise _not_alone()
            self._registry.archives.begin(self._wire.sock, request.msgid, request.method, params, seconds)
        except (RpcError, OSError) as error:
            self._answer(request.msgid, to_rpc_error(error))
            return
        self._closing = True
        self._let_go()


def _log_of(method: str, envelope: Envelope, params: Any) -> ContextLogger:
    return context(
        _log,
        method=method,
        request=envelope.request_id or "",
        container=getattr(params, "container", "") or "",
        process=getattr(params, "process", ""),
    )


def _not_alone() -> RpcError:
    return RpcError(
        Code.FAILED_PRECONDITION,
        "an archive needs a connection with nothing else on it, and nothing behind its request before"
        " archive.ready",
    )
