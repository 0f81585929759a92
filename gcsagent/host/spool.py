"""A spool of a remote process: a stream that outlives its connections, and says what it has dealt with.

What was read is counted; a connection that is lost is made again and attached where the count stands, so
that the reader sees nothing but a pause. A spool that blocks when it is full is told what has been dealt
with, a while behind the reader: that is what makes room in it. A log keeps what it can, and what it could
not is counted in :attr:`SpoolStream.dropped`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from typing import TYPE_CHECKING, Self

from gcsagent.host.closing import Closable
from gcsagent.host.errors import ClosedByUs, ConnectionBroken, HostError
from gcsagent.host.streams import CHUNK, Stream
from protocol.errors import Code, RpcError
from protocol.families.stream import Attach
from protocol.limits import MIN_SPOOL

if TYPE_CHECKING:
    from gcsagent.host.client import Client

ACK_BYTES = MIN_SPOOL
"""Acknowledged at a time. Not more than the smallest spool holds, or reader and writer would wait for each
other."""

MANY_BYTES = 1 << 20
"""Acknowledged at a time while there is more to read at once: a request for each 64 KiB would be most of the
work."""


class SpoolStream(Stream):
    """``dropped`` counts the bytes that a log gave up before they were read here."""

    @classmethod
    async def attach(
        cls, client: Client, wanted: Attach, *, acknowledge: bool, limit: int = MIN_SPOOL
    ) -> Self:
        """Attaches at ``wanted.offset``, or where the spool begins; later, should that be gone.

        ``acknowledge``: bytes are released in the guest once the reader has asked for those behind them.
        ``limit`` is the spool's, if it is known: a larger one is told of less often.
        Raises what :meth:`gcsagent.host.client.Client.attach` raises.
        """
        opened, dropped = await _open(client, wanted)
        stream = cls(opened.name, opened._sock, opened.offset, opened._first)
        stream._client, stream._wanted, stream._acknowledges = client, wanted, acknowledge
        stream._attaching = Closable(opened.name)
        stream.dropped = dropped
        stream._acked = stream._consumed = stream.position
        stream._least = min(MANY_BYTES, max(ACK_BYTES, limit // 8))
        return stream

    _client: Client
    _wanted: Attach
    _attaching: Closable
    _acknowledges = False
    _acked = 0
    _step = _least = ACK_BYTES
    _consumed = 0
    _over = False
    _acking: asyncio.Task[None] | None = None
    dropped = 0

    async def read(self, size: int = CHUNK) -> bytes:
        """Up to ``size`` bytes; b"" at the stated end, or when the process is deleted in the guest.

        Asking for more says that what was returned before has been dealt with. Raises ClosedByUs,
        ConnectFailed when the agent does not come back, RpcError.
        """
        self._consumed = self.position
        self._acknowledge(MANY_BYTES)
        while True:
            try:
                data = await super().read(size)
            except ConnectionBroken:
                data = b""
            if data:
                return data
            if self._over or (self._goal is not None and self.position >= self._goal):
                await self.acknowledged()
                return b""
            await self._attach_again()

    async def acknowledged(self) -> None:
        """Until the guest knows that all that was read has been dealt with, or is gone itself."""
        if self._acking is not None:
            await asyncio.wait((self._acking,))
        self._consumed = self.position
        if self._acknowledges and self._consumed > self._acked:
            self._step = 1
            await self._send_acks()

    def close(self) -> None:
        if self._acking is not None:
            self._acking.cancel()
        self._attaching.close()
        super().close()

    async def _readable(self) -> None:
        self._acknowledge(self._least)  # the writer may be waiting for just that
        await super()._readable()

    def _acknowledge(self, step: int) -> None:
        """Acknowledges if there are ``step`` bytes to it; goes for who is at it already, too."""
        self._step = step
        idle = self._acking is None or self._acking.done()
        if self._acknowledges and idle and self._consumed - self._acked >= step:
            self._acking = asyncio.create_task(self._send_acks())

    async def _send_acks(self) -> None:
        """Until less than a step is unacknowledged. Failing is no matter: the next one says all."""
        wanted = self._wanted
        with contextlib.suppress(RpcError, HostError):
            while self._consumed - self._acked >= self._step:
                target = self._consumed
                await self._client.ack_stream(wanted.container, wanted.process, wanted.stream, target)
                self._acked = target

    async def _attach_again(self) -> None:
        wanted = dataclasses.replace(self._wanted, offset=self.position, take=True)
        try:
            async with self._attaching():
                opened, dropped = await _open(self._client, wanted)
        except RpcError as error:
            if error.code is not Code.NOT_FOUND:
                raise
            self._over = True
            return
        if self.closed:
            opened.close()
            raise ClosedByUs(f"{self.name} has been closed by this side")
        self._sock.close()
        self._sock, self._first = opened._sock, opened._first
        self.offset, self.received = opened.offset, 0
        self.dropped += dropped
        self._ended.clear()


async def _open(client: Client, wanted: Attach) -> tuple[Stream, int]:
    """Attaches, at the oldest byte kept when the wanted one is no more, and how many are missing then."""

    async def attach(offset: int | None) -> Stream:
        return await Stream.open(
            client.address,
            dataclasses.replace(wanted, offset=offset),
            timeout=client.timeout,
            client_name=client.client_name,
        )

    try:
        return await attach(wanted.offset), 0
    except RpcError as error:
        if wanted.offset is None or not error.details.get("dropped"):
            raise
    opened = await attach(None)
    return opened, max(0, opened.offset - wanted.offset)
