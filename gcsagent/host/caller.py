"""Calls to an agent: one control connection, made again when it is lost, and how long an answer may take."""

from __future__ import annotations

import asyncio
import secrets
from typing import Any, Self

from gcsagent.host.closing import Closable, Closing
from gcsagent.host.dialogue import decode_result, despite_losses, encode_params, greet
from gcsagent.host.errors import AgentSilent, ConnectFailed
from gcsagent.host.link import Link
from gcsagent.host.transport import Address
from protocol.address import parse_dial
from protocol.errors import Code, RpcError
from protocol.families.agent import Welcome
from protocol.methods import METHODS

_IDEMPOTENT = frozenset(
    {
        "process.resize",
        "process.close_stdin",
        "stream.ack",
        "agent.shutdown",
        "agent.log_level",
        "forward.close_write",
        "network.apply",
        "network.attach",
    }
)
"""Mutating methods that come to the same when they are carried out twice."""

CONNECT_SECONDS = 10.0
"""How long connect waits for an agent to come up."""

GRACE_SECONDS = 5.0
"""What a call waits beyond its deadline, so that the agent's own answer about it wins."""


class Caller(Closing):
    """Calls to one agent. Safe to use from many tasks of one event loop."""

    def __init__(self, address: Address, *, timeout: float, client_name: str) -> None:
        """Use :meth:`connect`."""
        self.address = address
        self.timeout = timeout
        self.client_name = client_name
        self.welcome: Welcome | None = None
        self._link: Link | None = None
        self._open = Closable("this client")
        self._linking = asyncio.Lock()
        self._failures = 0
        self._failure = ""

    @classmethod
    async def connect(
        cls,
        address: str | Address,
        *,
        timeout: float = CONNECT_SECONDS,
        patience: float | None = None,
        client_name: str = "gcsagent.host",
    ) -> Self:
        """Waits up to ``timeout`` seconds for the agent at ``address`` (``unix:``, ``vsock:``, ``hvsock:``).

        ``patience`` is the same for an agent that was there and is to come back; ``timeout`` if not given.

        Raises:
            ValueError: not an address.
            ConnectFailed: no agent in that time, or none possible there.
            RpcError: the agent refused the greeting (no common protocol version).
            RemoteProtocolError: what answers is no agent.
        """
        parsed = parse_dial(address) if isinstance(address, str) else address
        client = cls(parsed, timeout=timeout, client_name=client_name)
        await client._linked()
        if patience is not None:
            client.timeout = patience
        return client

    async def aclose(self) -> None:
        """Closes the control connection; streams and event subscriptions have their own.

        Calls under way end with ClosedByUs, also those that wait for an agent to come back.
        """
        self._open.close()
        if self._link is not None:
            await self._link.close()

    # -- calls ----------------------------------------------------------------------------------

    async def call(
        self, method: str, params: object, *, deadline: float | None = None, request_id: str | None = None
    ) -> Any:
        """One request; the result is the dataclass ``protocol.methods.METHODS[method].result``.

        ``deadline`` is in seconds; without it the method's own applies, and some have none. Cancelling the
        caller cancels the request. A connection that is lost is made again and the request repeated; a
        mutating one gets a ``request_id`` if none is given, so that it is carried out once.

        Raises:
            RpcError: how the agent says it failed; :class:`AgentSilent` when it says nothing in time.
            ConnectFailed: the agent has not come back in time (``patience``).
            ConnectionLost: the connection was lost again and again; ClosedByUs: :meth:`aclose` was called.
            RemoteProtocolError: the agent broke the contract.
        """
        repeatable = method in METHODS and (not METHODS[method].mutating or method in _IDEMPOTENT)
        if request_id is None and not repeatable:
            # An agent that was restarted must not carry out the same request twice.
            request_id = secrets.token_hex(8)
        wire = encode_params(method, params, deadline=deadline, request_id=request_id)
        limit = answer_limit(method, deadline)
        try:
            async with asyncio.timeout(limit):
                async for attempt in despite_losses(self._generation):
                    with attempt:
                        return decode_result(method, await (await self._linked()).call(method, wire))
        except TimeoutError:
            raise AgentSilent(method, limit or 0) from None
        raise AssertionError("AsyncRetrying ends only by returning or raising")

    def _generation(self) -> int | None:
        return self.welcome.generation if self.welcome is not None else None

    async def _linked(self) -> Link:
        """The link in use; a new one when the last was lost."""
        self._open.check()
        if self._link is not None and self._link.lost is None:
            return self._link
        failures = self._failures
        async with self._open(), self._linking:
            if self._link is None or self._link.lost is not None:
                if self._failures != failures:
                    # Somebody has waited for it meanwhile: for each in turn it could take hours.
                    raise ConnectFailed(self._failure)
                self._link = await self._dialled()
            return self._link

    async def _dialled(self) -> Link:
        if self._link is not None:
            await self._link.close()
        try:
            dialogue, self.welcome = await greet(
                self.address, timeout=self.timeout, client_name=self.client_name
            )
        except ConnectFailed as error:
            self._failures, self._failure = self._failures + 1, str(error)
            raise
        link = await Link.over(dialogue)
        if self._open.closed:
            await link.close()
            self._open.check()
        return link

    def offers(self, feature: str) -> bool:
        """Whether the agent has said that it has it."""
        return self.welcome is not None and feature in self.welcome.features

    async def _require(self, feature: str) -> None:
        await self._linked()
        if not self.offers(feature):
            raise RpcError(Code.UNIMPLEMENTED, f"the agent at {self.address} has no {feature}: upgrade it")


def answer_limit(method: str, deadline: float | None) -> float | None:
    """Seconds the host waits for an answer, or None for ever."""
    if deadline is not None:
        return deadline + GRACE_SECONDS
    own = METHODS[method].deadline_ms
    return None if own is None else own / 1000 + GRACE_SECONDS
