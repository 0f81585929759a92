"""One connection: its requests, until ``shell.open`` makes it a shell's."""

from __future__ import annotations

import select
import socket
from typing import TYPE_CHECKING, Any

from gcsagent import __version__
from gcsagent.common.loop import READ, WRITE, Timer
from gcsagent.shell.relay import GONE
from gcsagent.shell.shell import Shell
from protocol import PROTOCOL_MAX, PROTOCOL_MIN
from protocol.connection import Connection, Role, State
from protocol.errors import Code, LocalProtocolError, RemoteProtocolError, RpcError
from protocol.families.agent import Hello, Welcome
from protocol.families.shell import SHELL, CloseInput, OpenShell, ResizeShell, ShellEnd, ShellRef
from protocol.framing import Message, Notification, Request
from protocol.method import Empty, Envelope
from protocol.methods import CANCEL, ELSEWHERE, HELLO, METHODS, STREAMING, Cancel
from protocol.schema import SchemaError, from_wire, to_wire

if TYPE_CHECKING:
    from gcsagent.shell.server import Server

CHUNK = 65536
MAX_UNREAD = 65536
"""Bytes of answers a client may leave unread before its next requests are left unread, too."""


class Session:
    def __init__(self, server: Server, sock: socket.socket, peer: str) -> None:
        self._server, self._loop, self._sock = server, server.loop, sock
        self._peer, self._client = peer, ""
        self._connection = Connection(Role.SERVER, server.limits)
        self._out = bytearray()
        self._deadlines: dict[int, Timer] = {}
        self._opening: tuple[Shell, int] | None = None
        self._closed = False
        self._late: Timer | None = None
        self._set_late()
        self._watch()

    @property
    def greeted(self) -> bool:
        return self._connection.state is not State.FRESH

    # -- bytes ----------------------------------------------------------------------------------

    def _watch(self) -> None:
        if not self._closed:
            wanted = READ if self._opening is None and len(self._out) <= MAX_UNREAD else 0
            events = wanted | (WRITE if self._out else 0) | select.EPOLLRDHUP
            self._loop.watch(self._sock.fileno(), self._on_event, events)

    def _on_event(self, events: int) -> None:
        try:
            if events & WRITE:
                self._flush()
            if events & READ and self._opening is None:
                data = self._sock.recv(CHUNK)
                if not data:
                    self.close()
                    return
                self._receive(data)
            elif events & GONE:
                self.close()
        except BlockingIOError:
            pass
        except OSError:
            self.close()
        self._watch()

    def _receive(self, data: bytes) -> None:
        try:
            self._connection.feed(data)
            while not self._closed and (message := self._connection.next_message()) is not None:
                self._on_message(message)
            self._set_late()
        except RemoteProtocolError as error:
            self._write(self._connection.farewell(error))
            self.close()

    def _set_late(self) -> None:
        """A client that owes us hello, or the rest of a message, may not take for ever."""
        owes = not self._closed and (not self.greeted or self._connection.unfinished > 0)
        if owes and self._late is None:
            self._late = self._loop.after(self._server.limits.max_stall_ms / 1000, self._on_late)
        elif not owes and self._late is not None:
            self._late.cancel()
            self._late = None

    def _on_late(self) -> None:
        error = RemoteProtocolError("late", "hello, or the rest of a message, did not come (max_stall_ms)")
        self._write(self._connection.farewell(error))
        self.close()

    def _write(self, data: bytes) -> None:
        self._out += data
        self._flush()
        self._watch()

    def _flush(self) -> None:
        try:
            del self._out[: self._sock.send(self._out)]
        except BlockingIOError:
            return
        except OSError:
            self._out.clear()  # that it is gone is seen at once

    def close(self) -> None:
        if self._closed:
            return
        self._let_go()
        self._sock.close()
        if self._opening is not None:
            self._opening[0].give_up()
            self._opening = None

    def _let_go(self) -> None:
        self._closed = True
        self._connection.close()
        self._loop.forget(self._sock.fileno())
        for timer in (self._late, *self._deadlines.values()):
            if timer is not None:
                timer.cancel()
        self._deadlines.clear()
        self._server.session_gone(self)

    # -- requests -------------------------------------------------------------------------------

    def _on_message(self, message: Message) -> None:
        if isinstance(message, Request):
            try:
                self._on_request(message)
            except RpcError as error:
                self._answer(message.msgid, error)
        elif isinstance(message, Notification) and message.method == CANCEL:
            try:
                msgid = from_wire(Cancel, message.params).msgid
            except SchemaError as error:
                raise RemoteProtocolError("malformed", f"{CANCEL}: {error}") from error
            if msgid in self._deadlines or self._server.is_waiting(self, msgid):
                self._give_up(msgid, Code.CANCELLED, "the wait was cancelled")

    def _on_request(self, request: Request) -> None:
        method = METHODS.get(request.method)
        if method is None or request.method not in (ELSEWHERE | {HELLO}):
            raise RpcError(
                Code.UNIMPLEMENTED,
                f"the debug shell has no method {request.method[:64]!r}; the agent is on another port",
            )
        if request.method in STREAMING:
            self._connection.next_message()  # raises when something has come behind it
        try:
            envelope = from_wire(Envelope, request.params)
            params: Any = from_wire(method.params, request.params)
        except SchemaError as error:
            raise RpcError(Code.INVALID_ARGUMENT, f"{request.method}: {error}", field=error.field) from error
        if self._connection.outstanding > self._server.limits.max_in_flight:
            raise self._server.exhausted("max_in_flight", "requests are outstanding on this connection")
        self._handle(request, params, envelope.deadline_ms or method.deadline_ms)

    def _handle(self, request: Request, params: Any, deadline_ms: int | None) -> None:
        match params:
            case Hello():
                self._connection.next_message()  # raises when something has come behind it
                self._answer(request.msgid, self._hello(params))
            case OpenShell():
                self._open(request.msgid, params, deadline_ms)
            case ResizeShell():
                self._server.shell(params.shell).resize(params.winsize)
                self._answer(request.msgid, Empty())
            case CloseInput():
                self._server.shell(params.shell).close_input(params.offset)
                self._answer(request.msgid, Empty())
            case ShellRef() if request.method == "shell.kill":
                self._server.shell(params.shell).end(ShellEnd.KILLED)
                self._answer(request.msgid, Empty())
            case ShellRef():
                self._wait(request.msgid, params.shell, deadline_ms)
            case _:
                self._answer(request.msgid, self._server.list())

    def _hello(self, hello: Hello) -> Welcome:
        chosen = min(hello.protocol_max, PROTOCOL_MAX)
        if chosen < max(hello.protocol_min, PROTOCOL_MIN):
            raise RpcError(
                Code.FAILED_PRECONDITION,
                f"this debug shell speaks protocol {PROTOCOL_MIN} to {PROTOCOL_MAX}, the client"
                f" {hello.protocol_min} to {hello.protocol_max}: one of them must be updated",
            )
        self._server.admit()
        self._client = hello.client[:64]
        server = self._server
        return Welcome(chosen, __version__, server.boot_id, server.generation, (SHELL,), server.limits)

    def _answer(self, msgid: int, result: Any) -> None:
        """Sends a result, or the error that ``result`` is."""
        if self._closed:
            return
        timer = self._deadlines.pop(msgid, None)
        if timer is not None:
            timer.cancel()
        try:
            if isinstance(result, RpcError):
                frame = self._connection.fail(msgid, result)
            else:
                frame = self._connection.respond(msgid, to_wire(result))
        except LocalProtocolError as error:
            frame = self._connection.fail(msgid, RpcError(Code.RESOURCE_EXHAUSTED, f"the answer {error}"))
        self._write(frame)

    def _give_up(self, msgid: int, code: Code, why: str) -> None:
        self._server.wait_no_more(self, msgid)
        self._answer(msgid, RpcError(code, why))

    # -- waiting --------------------------------------------------------------------------------

    def _wait(self, msgid: int, shell: str, deadline_ms: int | None) -> None:
        if self._server.wait_for(shell, self, msgid) and deadline_ms is not None:
            late = Code.DEADLINE_EXCEEDED, "the shell has not ended within the request's deadline"
            self._deadlines[msgid] = self._loop.after(deadline_ms / 1000, lambda: self._give_up(msgid, *late))

    def shell_ended(self, msgid: int, shell: Shell) -> None:
        self._answer(msgid, shell.exit)

    # -- opening --------------------------------------------------------------------------------

    def _open(self, msgid: int, params: OpenShell, deadline_ms: int | None) -> None:
        shell = self._server.open(params, (self._peer, self._client), self._opened)
        self._opening = shell, msgid
        seconds = (deadline_ms or 0) / 1000
        self._deadlines[msgid] = self._loop.after(seconds, lambda: self._opens_too_late(msgid))
        self._watch()

    def _opens_too_late(self, msgid: int) -> None:
        if self._opening is not None:
            shell, self._opening = self._opening[0], None
            shell.give_up()
            self._answer(
                msgid,
                RpcError(
                    Code.DEADLINE_EXCEEDED,
                    "the program has not begun within the request's deadline; what it is on may hang",
                ),
            )

    def _opened(self, shell: Shell, failure: RpcError | None) -> None:
        if self._opening is None or self._opening[0] is not shell:
            return
        _, msgid = self._opening
        self._opening = None
        if failure is not None:
            self._answer(msgid, failure)
            return
        opened = self._server.opened(shell)
        frame = self._connection.respond(msgid, to_wire(opened))
        self._let_go()
        shell.connect(self._sock, bytes(self._out) + frame)
