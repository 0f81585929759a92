"""One connection, either side of it, without I/O.

The owner gives it the bytes that arrived and gets messages; it asks for messages to send and gets bytes.
A connection is always in one state, and what may happen in it is :data:`TRANSITIONS`, driven by the same
events on both sides (a request is the same event for the client that sends it and the server that
receives it):

    FRESH      nothing but ``agent.hello`` may be asked
    GREETING   hello is outstanding
    OPEN       requests, responses, notifications
    ATTACHING  ``stream.attach`` is outstanding, alone
    STREAM     the reply to attach has been made: from here on the bytes are the stream's own
    CLOSED     the contract was broken, or the owner closed

What the other side did wrong raises RemoteProtocolError, once, and closes; what our own caller did wrong
raises LocalProtocolError and changes nothing.
"""

from __future__ import annotations

from enum import Enum, StrEnum
from typing import Any

from protocol.errors import LocalProtocolError, ProtocolError, RemoteProtocolError, RpcError
from protocol.framing import (
    NOTIFICATION,
    REQUEST,
    RESPONSE,
    Message,
    Notification,
    Request,
    Response,
    classify,
    decode,
    encode,
    is_ours,
    pack,
)
from protocol.limits import MAX_MSGID, Limits
from protocol.methods import HELLO, PROTOCOL_ERROR, STREAMING
from protocol.scan import FrameScanner, is_plain


class Role(Enum):
    CLIENT = "client"
    SERVER = "server"


class State(StrEnum):
    FRESH = "FRESH"
    GREETING = "GREETING"
    OPEN = "OPEN"
    ATTACHING = "ATTACHING"
    STREAM = "STREAM"
    CLOSED = "CLOSED"

    __hash__ = str.__hash__  # Enum's own is written in Python, and every message is looked up by it


class Step(StrEnum):
    """What happens on a connection, seen from both sides alike."""

    HELLO = "agent.hello"
    WELCOME = "welcome"
    REJECTED = "hello refused"
    REQUEST = "request"
    RESPONSE = "response"
    ATTACH = "stream.attach"
    ATTACHED = "attach granted"
    REFUSED = "attach refused"
    CLIENT_NOTE = "client notification"
    SERVER_NOTE = "server notification"

    __hash__ = str.__hash__


TRANSITIONS: dict[tuple[State, Step], State] = {
    (State.FRESH, Step.HELLO): State.GREETING,
    (State.GREETING, Step.WELCOME): State.OPEN,
    (State.GREETING, Step.REJECTED): State.FRESH,
    (State.OPEN, Step.REQUEST): State.OPEN,
    (State.OPEN, Step.RESPONSE): State.OPEN,
    (State.OPEN, Step.CLIENT_NOTE): State.OPEN,
    (State.OPEN, Step.SERVER_NOTE): State.OPEN,
    (State.OPEN, Step.ATTACH): State.ATTACHING,
    (State.ATTACHING, Step.ATTACHED): State.STREAM,
    (State.ATTACHING, Step.REFUSED): State.OPEN,
    (State.ATTACHING, Step.SERVER_NOTE): State.ATTACHING,  # an event that crossed the request
}
"""Every allowed (state, step); anything else names itself in the error."""

_OPEN, _PLACES = State.OPEN, STREAMING | {HELLO}
"""The state in which nearly all happens, and what alone leads into it and out of it."""


class Connection:
    """The contract's state on one connection. Not thread-safe; owns no file descriptor."""

    __slots__ = ("_outstanding", "_pending_error", "_role", "_scanner", "peer", "state")

    def __init__(self, role: Role, limits: Limits | None = None) -> None:
        """``limits`` are for what is received; :attr:`peer` holds those for what is sent."""
        self._role = role
        self._scanner = FrameScanner(limits or Limits())
        self.peer = Limits()
        self._outstanding: dict[int, str] = {}
        self._pending_error: RemoteProtocolError | None = None
        self.state = State.FRESH

    @property
    def outstanding(self) -> int:
        """Requests without their response yet."""
        return len(self._outstanding)

    # -- receiving ------------------------------------------------------------------------------

    def receive(self, data: bytes) -> list[Message]:
        """The messages that ``data`` completes.

        Raises RemoteProtocolError when the other side broke the contract; messages completed before the
        fault are returned first and the error is raised by the next call (``receive(b"")`` will do). The
        state is CLOSED at once: they cannot be answered any more.
        """
        self.feed(data)
        messages: list[Message] = []
        try:
            while (message := self.next_message()) is not None:
                messages.append(message)
        except RemoteProtocolError:
            if not messages:
                raise
        return messages

    def feed(self, data: bytes) -> None:
        """Takes bytes in; :meth:`next_message` finds out what they are."""
        if self._pending_error is not None:
            raise self._pending_error
        if self.state in (State.STREAM, State.CLOSED):
            raise LocalProtocolError(f"no messages in state {self.state}")
        self._scanner.feed(data)

    def next_message(self) -> Message | None:
        """The next whole message, if there is one; the connection's state is what it is behind it.

        Raises RemoteProtocolError, from the first breach of the contract on.
        """
        if self._pending_error is not None:
            raise self._pending_error
        try:
            if self.state is not _OPEN and not self._expects_messages():
                return None
            value = self._scanner.next_value()
            if value is not None:
                message = classify(value)
            elif (frame := self._scanner.next_frame()) is not None:
                message = decode(frame)
            else:
                return None
            self._received(message)
        except RemoteProtocolError as error:
            self.state = State.CLOSED
            self._scanner.take_rest()
            self._pending_error = error
            raise
        return message

    @property
    def unfinished(self) -> int:
        """Bytes received that have not become messages."""
        return self._scanner.buffered

    def stream_bytes(self) -> bytes:
        """In STREAM: what arrived behind the reply to attach, the first bytes of the stream."""
        if self.state is not State.STREAM:
            raise LocalProtocolError(f"no stream in state {self.state}")
        return self._scanner.take_rest()

    def _expects_messages(self) -> bool:
        """Behind a request to attach a server must not even look for a message: it has no right to one."""
        if self._role is Role.SERVER and self.state is State.ATTACHING:
            if self._scanner.buffered:
                raise RemoteProtocolError("early_bytes", "nothing may follow it before its reply")
            return False
        return self.state not in (State.STREAM, State.CLOSED)

    def _received(self, message: Message) -> None:
        client_talks = self._role is Role.SERVER
        if isinstance(message, Request):
            if not client_talks:
                raise RemoteProtocolError("direction", "the agent sends no requests")
            self._open_request(message.msgid, message.method, RemoteProtocolError)
        elif isinstance(message, Response):
            if client_talks:
                raise RemoteProtocolError("direction", "the client sends no responses")
            self._close_request(message.msgid, message.error is not None, RemoteProtocolError)
        else:
            if message.method == PROTOCOL_ERROR and not client_talks:
                raise RemoteProtocolError(
                    "peer", f"the agent closed the connection: {message.params.get('message')}"
                )
            self._step(Step.CLIENT_NOTE if client_talks else Step.SERVER_NOTE, RemoteProtocolError)

    # -- sending --------------------------------------------------------------------------------

    def request(self, msgid: int, method: str, params: dict[str, Any]) -> bytes:
        """The bytes of a request. The caller chooses an msgid that is not outstanding."""
        self._must_be(Role.CLIENT)
        frame = self._encode([REQUEST, msgid, method, [params]])
        self._open_request(msgid, method, LocalProtocolError)
        return frame

    def respond(self, msgid: int, result: Any, depth: int | None = None) -> bytes:
        """The bytes of a success; for a method that streams the connection is the stream's from here on.

        ``depth`` is that of ``result`` where its type tells (schema.depth_of): then there is nothing in it to
        be looked at, but how large it is.
        """
        self._must_be(Role.SERVER)
        frame = self._encode([RESPONSE, msgid, None, result], depth)
        self._close_request(msgid, False, LocalProtocolError)
        return frame

    def fail(self, msgid: int, error: RpcError) -> bytes:
        self._must_be(Role.SERVER)
        frame = self._encode([RESPONSE, msgid, error.to_wire(), None])
        self._close_request(msgid, True, LocalProtocolError)
        return frame

    def notify(self, method: str, params: dict[str, Any]) -> bytes:
        frame = self._encode([NOTIFICATION, method, [params]])
        self._step(Step.CLIENT_NOTE if self._role is Role.CLIENT else Step.SERVER_NOTE, LocalProtocolError)
        return frame

    def farewell(self, error: RemoteProtocolError) -> bytes:
        """The one notification that says why a connection is being closed."""
        self.state = State.CLOSED
        return encode(Notification(PROTOCOL_ERROR, error.to_wire()))

    def close(self) -> None:
        self.state = State.CLOSED

    def _encode(self, message: list[Any], depth: int | None = None) -> bytes:
        try:
            frame = pack(message)
            peer = self.peer
            if depth is None or depth >= peer.max_depth or len(frame) > min(peer.max_frame, peer.max_values):
                self._hold_to_the_contract(frame)
        except (TypeError, ValueError, OverflowError, RemoteProtocolError) as error:
            raise LocalProtocolError(f"cannot be sent: {error}") from error
        return frame

    def _hold_to_the_contract(self, frame: bytes) -> None:
        """What we would refuse from the peer, the peer would refuse from us, and close for it."""
        if is_plain(frame, self.peer) and is_ours(frame):
            return
        scanner = FrameScanner(self.peer)
        scanner.feed(frame)
        scanner.next_frame()
        decode(frame)

    def _must_be(self, role: Role) -> None:
        if self._role is not role:
            raise LocalProtocolError(f"only the {role.value} does that")

    # -- the table ------------------------------------------------------------------------------

    def _open_request(self, msgid: int, method: str, error: type[ProtocolError]) -> None:
        usual = self.state is _OPEN and method not in _PLACES
        if usual and msgid not in self._outstanding and 0 <= msgid <= MAX_MSGID:
            self._outstanding[msgid] = method
            return
        if not 0 <= msgid <= MAX_MSGID:
            raise _error(error, "msgid", f"msgid {msgid} is not a 32-bit unsigned integer")
        if msgid in self._outstanding:
            raise _error(error, "msgid", f"msgid {msgid} is already outstanding")
        step = Step.HELLO if method == HELLO else Step.ATTACH if method in STREAMING else Step.REQUEST
        if step is Step.ATTACH and self._outstanding:
            raise _error(error, "busy", f"{method} needs a connection with nothing outstanding")
        self._step(step, error)
        self._outstanding[msgid] = method

    def _close_request(self, msgid: int, failed: bool, error: type[ProtocolError]) -> None:
        method = self._outstanding.get(msgid)
        if method is None:
            raise _error(error, "msgid", f"no request {msgid} is outstanding")
        if self.state is _OPEN:  # what leads out of it is never outstanding in it
            del self._outstanding[msgid]
            return
        if method == HELLO:
            step = Step.REJECTED if failed else Step.WELCOME
        elif method in STREAMING:
            step = Step.REFUSED if failed else Step.ATTACHED
        else:
            step = Step.RESPONSE
        self._step(step, error)
        del self._outstanding[msgid]

    def _step(self, step: Step, error: type[ProtocolError]) -> None:
        target = TRANSITIONS.get((self.state, step))
        if target is None:
            raise _error(error, "state", f"{step} is not allowed in state {self.state}")
        self.state = target


def _error(error: type[ProtocolError], kind: str, message: str) -> ProtocolError:
    return RemoteProtocolError(kind, message) if error is RemoteProtocolError else error(message)
