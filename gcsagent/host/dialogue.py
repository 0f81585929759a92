"""One connection used by one task: ask, then read until the answer is there.

Every connection begins as one. A control connection goes on as a :class:`gcsagent.host.link.Link`, an event
subscription stays one, a stream takes the bare socket out of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    wait_random_exponential,
)
from tenacity.stop import stop_base

from gcsagent.host.errors import ClosedByPeer, ClosedByUs, ConnectFailed, ConnectionBroken, NotReady
from gcsagent.host.text import printable
from gcsagent.host.transport import Address, dial, receive
from protocol import PROTOCOL_MAX, PROTOCOL_MIN
from protocol.connection import Connection, Role, State
from protocol.errors import Code, RemoteProtocolError, RpcError
from protocol.families.agent import Hello, Welcome
from protocol.framing import Message, Notification, Response
from protocol.method import Envelope
from protocol.methods import HELLO, METHODS
from protocol.schema import SchemaError, from_wire, to_wire

_CHUNK = 65536
_LOSSES = 5
_SOON = 5.0
"""Seconds: a connection that held longer than that was a good one, and its loss is the first of a row."""
_MAX_EARLY = 4096
"""Notifications kept while an answer is awaited; more than any replay ring needs before its reply."""


def encode_params(
    method: str, params: object, *, deadline: float | None = None, request_id: str | None = None
) -> dict[str, Any]:
    """The parameters of ``method`` as the map that goes on the wire, with the envelope's keys.

    They are checked as the agent will check them, so that a bad id costs no round trip.

    Raises:
        RpcError: INVALID_ARGUMENT, exactly as the agent would answer; UNIMPLEMENTED: no such method.
    """
    entry = METHODS.get(method)
    if entry is None:
        raise RpcError(Code.UNIMPLEMENTED, f"this client knows no method {method!r}")
    wire: dict[str, Any] = to_wire(params)
    try:
        from_wire(entry.params, wire)
        if deadline is not None:
            wire["deadline_ms"] = max(1, round(deadline * 1000))
        if request_id is not None:
            wire["request_id"] = request_id
        from_wire(Envelope, wire)
    except SchemaError as error:
        raise RpcError(Code.INVALID_ARGUMENT, str(error), field=error.field) from error
    return wire


def decode_result(method: str, wire: object) -> Any:
    """The result of ``method`` as its dataclass. Raises RemoteProtocolError, kind ``result``."""
    try:
        return from_wire(METHODS[method].result, wire)
    except SchemaError as error:
        raise RemoteProtocolError("result", f"the agent's result of {method}: {error}") from error


def answer(response: Response) -> Any:
    """The bare result of a response. Raises the RpcError it carries."""
    if response.error is not None:
        raise RpcError.from_wire(response.error)
    return response.result


@dataclass(slots=True)
class Dialogue:
    """Owns a connected non-blocking socket. Not to be used by two tasks at once.

    Reading may be cancelled and gone on with: no byte is lost.
    """

    sock: socket.socket
    connection: Connection = field(default_factory=lambda: Connection(Role.CLIENT))
    early: deque[Notification] = field(default_factory=deque)
    _arrived: deque[Message] = field(default_factory=deque)
    _last_id: int = 0

    async def hello(self, client_name: str) -> Welcome:
        """Greets. Raises RemoteProtocolError when the agent chose a version that was not offered."""
        welcome: Welcome = await self.ask(HELLO, Hello(PROTOCOL_MIN, PROTOCOL_MAX, client_name))
        if self.connection.state is State.CLOSED:
            self.connection.receive(b"")  # raises what was wrong behind the welcome
        if not PROTOCOL_MIN <= welcome.protocol <= PROTOCOL_MAX:
            raise RemoteProtocolError("version", f"the agent chose protocol {welcome.protocol}")
        self.connection.peer = welcome.limits
        return welcome

    async def ask(self, method: str, params: object) -> Any:
        """One request and its typed result; notifications that come first are kept in ``early``.

        Raises:
            RpcError: the agent's answer.
            RemoteProtocolError: it broke the contract.
            ConnectionLost: no answer will come.
        """
        await self.send(method, params)
        while True:
            message = await self.message()
            if isinstance(message, Response):
                return decode_result(method, answer(message))
            if len(self.early) >= _MAX_EARLY:
                raise RemoteProtocolError("flood", f"no answer to {method}, only notifications")
            self.early.append(message)

    async def send(self, method: str, params: object, *, deadline: float | None = None) -> None:
        """One request; :meth:`message` gives its response. Raises RpcError for what is wrong about it."""
        self._last_id += 1
        wire = encode_params(method, params, deadline=deadline)
        await self._write(self.connection.request(self._last_id, method, wire))

    async def notify(self, method: str, params: dict[str, Any]) -> None:
        await self._write(self.connection.notify(method, params))

    async def _write(self, frame: bytes) -> None:
        try:
            await asyncio.get_running_loop().sock_sendall(self.sock, frame)
        except OSError as error:
            self._hear_why()
            raise ConnectionBroken(f"the connection to the agent broke: {error.strerror}") from error

    def _hear_why(self) -> None:
        """What it said before it closed tells more than that it did. Raises RemoteProtocolError."""
        with contextlib.suppress(OSError):
            if self.connection.state is not State.CLOSED and (data := self.sock.recv(_CHUNK)):
                self._arrived.extend(self.connection.receive(data))

    async def notification(self) -> Notification:
        """The next notification, in order. Raises RemoteProtocolError or ConnectionLost."""
        if self.early:
            return self.early.popleft()
        message = await self.message()
        if isinstance(message, Response):
            raise RemoteProtocolError("msgid", "a response that nobody waits for")
        return message

    async def message(self) -> Response | Notification:
        """What comes next. Raises RemoteProtocolError or ConnectionLost."""
        while not self._arrived:
            self._arrived.extend(await self._receive())
        message = self._arrived.popleft()
        assert isinstance(message, Response | Notification)  # Connection refuses requests to a client
        return message

    async def _receive(self) -> list[Message]:
        if self.connection.state is State.CLOSED:
            self.connection.receive(b"")  # raises what was wrong behind the last good message
            raise ClosedByUs("the connection was closed by this side")
        try:
            data = await receive(self.sock, _CHUNK)
        except OSError as error:
            raise ConnectionBroken(f"the connection to the agent broke: {error.strerror}") from error
        if not data:
            raise ClosedByPeer("the agent closed the connection")
        return self.connection.receive(data)

    def close(self) -> None:
        self.sock.close()


_LOST = (ClosedByPeer, ConnectionBroken)


class despite_losses:
    """Attempts at something that may be repeated: a few losses of the connection in a row are overcome.

    ``generation`` says which agent was spoken to last: an agent that was restarted meanwhile begins with a
    clean record, so that a wait goes on however often that happens. The first attempt, nearly always the
    only one, goes without the bookkeeping of those behind it, which takes as long as a request.
    """

    def __init__(self, generation: Callable[[], int | None] = lambda: None) -> None:
        self._generation = generation
        self._begun = self._succeeded = False
        self._others: AsyncIterator[Any] | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> contextlib.AbstractContextManager[Any]:
        if not self._begun:
            self._begun = True
            return self
        if self._succeeded:
            raise StopAsyncIteration
        if self._others is None:
            self._others = aiter(
                AsyncRetrying(
                    retry=retry_if_exception_type(_LOST),
                    stop=_Losses(self._generation),
                    wait=wait_random_exponential(multiplier=0.02, max=1.0),
                    reraise=True,
                )
            )
        attempt: contextlib.AbstractContextManager[Any] = await anext(self._others)
        return attempt

    def __enter__(self) -> None:
        return

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> bool:
        self._succeeded = kind is None
        return kind is not None and issubclass(kind, _LOST)


class _Losses(stop_base):
    """Stops after _LOSSES by one and the same agent, each soon after the one before."""

    def __init__(self, generation: Callable[[], int | None]) -> None:
        """Made behind the first loss."""
        self._generation = generation
        self._last, self._count, self._at = generation(), 1, time.monotonic()

    def __call__(self, retry_state: RetryCallState) -> bool:
        agent, now = self._generation(), time.monotonic()
        if agent != self._last or now - self._at > _SOON:
            self._count = 0
        self._last, self._at = agent, now
        self._count += 1
        return self._count >= _LOSSES


async def greet(address: Address, *, timeout: float, client_name: str) -> tuple[Dialogue, Welcome]:
    """Dials until an agent says hello.

    Refused, missing, reset and closed-too-early are retried with exponential back-off and jitter; what
    waiting cannot mend is raised at once.

    Raises:
        ConnectFailed: no agent in ``timeout`` seconds (the message has the last reason), or never there.
        RpcError: the agent refused the greeting.
        RemoteProtocolError: what answers is no agent.
    """
    reason = f"{address}: no answer yet"

    def note(state: RetryCallState) -> None:
        nonlocal reason
        if state.outcome is not None:
            reason = str(state.outcome.exception())

    try:
        async with asyncio.timeout(timeout):
            try:
                return await _greet_once(address, client_name)
            except NotReady as error:
                reason = str(error)
            async for attempt in AsyncRetrying(
                retry=retry_if_exception_type(NotReady),
                wait=wait_random_exponential(multiplier=0.02, max=1.0),
                after=note,
            ):
                with attempt:
                    return await _greet_once(address, client_name)
    except TimeoutError:
        raise ConnectFailed(f"no agent answered in {timeout:g} s: {reason}") from None
    raise AssertionError("AsyncRetrying without a stop ends only by returning or raising")


async def _greet_once(address: Address, client_name: str) -> tuple[Dialogue, Welcome]:
    dialogue = Dialogue(await dial(address))
    try:
        return dialogue, await dialogue.hello(client_name)
    except (ClosedByPeer, ConnectionBroken) as error:
        dialogue.close()
        raise NotReady(f"{address}: {printable(error)} before saying hello") from error
    except BaseException:
        dialogue.close()
        raise
