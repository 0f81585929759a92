"""One host connection: reads requests, runs them side by side, writes answers as they come.

Everything about the wire is :class:`protocol.connection.Connection`'s; this module moves its bytes,
decodes arguments by the method table, and gives each request its deadline. Reading stops while the host
does not read our answers; nothing is queued without bound.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Any

from gcsagent import __version__
from gcsagent.agent.call import Call
from gcsagent.agent.dispatch import Dispatcher
from gcsagent.agent.events import EventLog
from gcsagent.agent.info import AgentService
from gcsagent.agent.logs import context
from gcsagent.agent.registry import Registry
from protocol import PROTOCOL_MAX, PROTOCOL_MIN
from protocol.connection import Connection, Role, State
from protocol.errors import Code, LocalProtocolError, RemoteProtocolError, RpcError
from protocol.families.agent import Hello, Welcome
from protocol.families.events import Subscribe, Subscribed
from protocol.families.stream import Attach, Attached
from protocol.framing import Notification, Request
from protocol.limits import Limits
from protocol.method import Envelope
from protocol.methods import CANCEL, EVENT, METHODS, Cancel
from protocol.schema import SchemaError, from_wire, to_wire
from protocol.types import Event

READ_SIZE = 65_536
MAX_UNREAD = 256 * 1024
"""Bytes of answers a host may leave unread before its next requests are left unread, too."""

MAX_EVENTS_UNREAD = 4 << 20
"""Bytes a subscriber may leave unread before it is disconnected: it can come back and replay."""

FEATURES = ("events.replay", "fifo", "spool", "upgrade")

_log = logging.getLogger("agent.session")


class Session:
    """``closed`` is called once, when the connection is gone or has become a stream's."""

    def __init__(
        self,
        sock: socket.socket,
        peer: str,
        dispatcher: Dispatcher,
        registry: Registry,
        agent: AgentService,
        closed: Callable[[Session], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._sock, self._dispatcher, self._registry, self._agent = sock, dispatcher, registry, agent
        self._closed = closed
        self._connection = Connection(Role.SERVER)
        self._calls: dict[int, Call] = {}
        self._out = bytearray()
        self._closing = False
        self._unsubscribe: Callable[[], None] | None = None
        self._attaching: tuple[Attach, int] | None = None
        self._log = context(_log, peer=peer)
        self._loop.add_reader(sock, self._on_readable)

    # -- bytes ----------------------------------------------------------------------------------

    def _on_readable(self) -> None:
        try:
            data = self._sock.recv(READ_SIZE)
        except BlockingIOError:
            return
        except OSError as error:
            self.close(f"broken: {error}")
            return
        if not data:
            self.close("the host closed")
            return
        try:
            messages = self._connection.receive(data)
            if self._connection.state is State.CLOSED:
                self._connection.receive(b"")  # raises the fault; what came in front of it cannot be answered
            for message in messages:
                if isinstance(message, Request):
                    self._on_request(message)
                elif isinstance(message, Notification):
                    self._on_notification(message)
        except RemoteProtocolError as error:
            self._refuse(error)

    def _refuse(self, error: RemoteProtocolError) -> None:
        self._log.warning("protocol error", extra={"kind": error.kind, "error": error.message})
        self._write(self._connection.farewell(error))
        self.close("protocol error")

    def _write(self, data: bytes) -> None:
        if self._closing:
            return
        if not self._out:
            try:
                data = data[self._sock.send(data) :]
            except BlockingIOError:
                pass
            except OSError as error:
                self._loop.call_soon(self.close, f"broken: {error}")
                return
            if not data:
                return
            self._loop.add_writer(self._sock, self._on_writable)
        self._out += data
        if len(self._out) > MAX_UNREAD:
            self._loop.remove_reader(self._sock)

    def _on_writable(self) -> None:
        try:
            del self._out[: self._sock.send(self._out)]
        except BlockingIOError:
            return
        except OSError as error:
            self.close(f"broken: {error}")
            return
        if self._out:
            return
        self._loop.remove_writer(self._sock)
        if self._attaching is not None:
            self._hand_over()
        else:
            self._loop.add_reader(self._sock, self._on_readable)

    def close(self, reason: str) -> None:
        """Ends the connection. Requests that only wait are dropped; those that change things go on."""
        if self._closing:
            return
        self._closing = True
        self._log.debug("connection closed", extra={"reason": reason})
        self._connection.close()
        self._let_go()
        self._sock.close()
        for call in list(self._calls.values()):
            if not METHODS[call.method].mutating:
                call.abort(RpcError(Code.CANCELLED, "the connection was closed"))
        self._closed(self)

    def _let_go(self) -> None:
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        if self._unsubscribe is not None:
            self._unsubscribe()
            self._unsubscribe = None

    # -- requests -------------------------------------------------------------------------------

    def _on_request(self, request: Request) -> None:
        try:
            method = METHODS.get(request.method)
            if method is None:
                raise RpcError(Code.UNIMPLEMENTED, f"there is no method {request.method[:64]!r}")
            if len(self._calls) >= Limits().max_in_flight:
                raise RpcError(
                    Code.RESOURCE_EXHAUSTED, f"{len(self._calls)} requests are in flight on this connection"
                )
            try:
                envelope = from_wire(Envelope, request.params)
                params: Any = from_wire(method.params, request.params)
            except SchemaError as error:
                raise RpcError(
                    Code.INVALID_ARGUMENT, f"{request.method}: {error}", field=error.field
                ) from error
            self._begin(request, params, envelope)
        except RpcError as error:
            self._answer(request.msgid, error)

    def _begin(self, request: Request, params: Any, envelope: Envelope) -> None:
        match params:
            case Hello():
                self._answer(request.msgid, self._hello(params))
            case Attach():
                self._attach(request.msgid, params)
            case Subscribe():
                self._subscribe(request.msgid, params)
            case _:
                method = METHODS[request.method]
                deadline = envelope.deadline_ms or method.deadline_ms
                log = context(
                    _log,
                    method=request.method,
                    request=envelope.request_id or "",
                    container=getattr(params, "container", ""),
                    process=getattr(params, "process", ""),
                )
                call = Call(request.method, deadline, log)
                self._calls[request.msgid] = call
                self._dispatcher.run(
                    call, request.params, params, envelope, lambda result: self._finish(request.msgid, result)
                )

    def _finish(self, msgid: int, result: Any) -> None:
        call = self._calls.pop(msgid, None)
        if not self._closing:
            self._answer(msgid, result)
        if call is not None and call.afterwards is not None:
            call.afterwards()

    def _answer(self, msgid: int, result: Any) -> None:
        """Sends a result, or the error that ``result`` is."""
        try:
            if isinstance(result, RpcError):
                frame = self._connection.fail(msgid, result)
            else:
                frame = self._connection.respond(msgid, to_wire(result))
        except LocalProtocolError as error:  # larger than a frame may be
            frame = self._connection.fail(msgid, RpcError(Code.RESOURCE_EXHAUSTED, f"the answer {error}"))
        self._write(frame)

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
        self._log.debug("hello", extra={"client": hello.client[:64]})
        return Welcome(chosen, __version__, self._agent.boot_id, self._agent.generation, FEATURES)

    def _subscribe(self, msgid: int, params: Subscribe) -> None:
        events: EventLog = self._registry.events
        missed, dropped = events.since(params.after if params.after is not None else events.last)
        if self._unsubscribe is not None:
            self._unsubscribe()

        def deliver(event: Event) -> None:
            if params.container is not None and event.container != params.container:
                return
            self._write(self._connection.notify(EVENT, to_wire(event)))
            if len(self._out) > MAX_EVENTS_UNREAD:
                self._loop.call_soon(self.close, "the subscriber does not read")

        self._answer(msgid, Subscribed(events.last, dropped))
        for event in missed:
            deliver(event)
        self._unsubscribe = events.listen(deliver)

    def _attach(self, msgid: int, params: Attach) -> None:
        if self._unsubscribe is not None:
            raise RpcError(
                Code.FAILED_PRECONDITION, "this connection carries events; attach on one of its own"
            )
        stream = self._registry.get(params.container).process(params.process).stream(params.stream.value)
        stream.check_attachable(params.take, params.offset)
        self._attaching = (params, msgid)
        if not self._out:
            self._hand_over()

    def _hand_over(self) -> None:
        """The connection becomes the stream's, which answers first; this session ends without closing it."""
        assert self._attaching is not None
        params, msgid = self._attaching
        if self._closing:
            return
        try:
            stream = self._registry.get(params.container).process(params.process).stream(params.stream.value)
            offset = stream.check_attachable(params.take, params.offset)
        except RpcError as error:  # it changed while earlier answers were on their way out
            self._attaching = None
            self._answer(msgid, error)
            return
        reply = self._connection.respond(msgid, to_wire(Attached(offset)))
        self._closing = True
        self._let_go()
        try:
            stream.attach(self._sock, params.take, reply, offset)
        except OSError as error:  # out of descriptors, before the reply was on its way
            self._log.error("cannot attach", extra={"error": str(error)})
            self._sock.close()
        self._closed(self)
