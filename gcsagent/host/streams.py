"""One stream of a remote process: a raw connection, and the count of what has moved through it.

Closing the connection detaches and means nothing else; in particular it is neither the end of stdin
(``process.close_stdin``) nor, when the guest does it, proof that all output has come. Where the output
ends is a number of bytes the agent states elsewhere; :meth:`Stream.finish_at` takes it, and the reader then
stops exactly there, whoever still holds the other end of the pipe open.
"""

from __future__ import annotations

import asyncio
import dataclasses
import socket
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from gcsagent.host.dialogue import Dialogue, despite_losses, encode_params, greet
from gcsagent.host.errors import AgentSilent, ClosedByPeer, ClosedByUs, ConnectionBroken, OutputTruncated
from gcsagent.host.transport import Address, bell
from protocol.errors import Code, RpcError
from protocol.families.stream import Attach, Attached
from protocol.methods import ATTACH

CHUNK = 65536
_ATTACH_SECONDS = 15.0


class Stream:
    """An attached stream. One task may read while another writes (a TTY is duplex).

    ``offset`` is what had moved before this connection, ``received`` and ``sent`` what has since; in bytes.
    """

    def __init__(self, name: str, sock: socket.socket, offset: int, first: bytes = b"") -> None:
        """Use :meth:`gcsagent.host.client.Client.attach`."""
        self.name = name
        self.offset = offset
        self.received = 0
        self.sent = 0
        self.closed = False
        self._sock = sock
        self._first = first
        self._goal: int | None = None
        self._greedy = False
        self._wake_reader: Callable[[], None] = _nobody
        self._wake_writer: Callable[[], None] = _nobody
        self._ended = asyncio.Event()

    @classmethod
    async def open(
        cls,
        address: Address,
        wanted: Attach,
        *,
        timeout: float,
        client_name: str,
        launching: asyncio.Future[Any] | None = None,
    ) -> Self:
        """``launching`` is the request that makes the process, sent before; its failure is its caller's."""
        encode_params(ATTACH, wanted)
        async for attempt in despite_losses():
            with attempt:
                return await cls._open_once(address, wanted, timeout, client_name, launching)
            # Our earlier connection may have been granted before it was lost; it is in nobody's way.
            wanted = dataclasses.replace(wanted, take=True)
        raise AssertionError("ends only by returning or raising")

    @classmethod
    async def _open_once(
        cls,
        address: Address,
        wanted: Attach,
        timeout: float,
        client_name: str,
        launching: asyncio.Future[Any] | None,
    ) -> Self:
        dialogue, _ = await greet(address, timeout=timeout, client_name=client_name)
        try:
            reply = await _ask_early(dialogue, wanted, launching) if launching is not None else None
            if reply is None:
                async with asyncio.timeout(_ATTACH_SECONDS):
                    reply = await dialogue.ask(ATTACH, wanted)
            first = dialogue.connection.stream_bytes()
        except BaseException as error:
            dialogue.close()
            if isinstance(error, TimeoutError):
                raise AgentSilent(ATTACH, _ATTACH_SECONDS) from None
            raise
        return cls(wanted.stream.value, dialogue.sock, reply.offset, first)

    # -- output ---------------------------------------------------------------------------------

    @property
    def position(self) -> int:
        """Bytes of this stream that have come out of the guest, over this and earlier connections."""
        return self.offset + self.received

    def finish_at(self, total: int) -> None:
        """States where the output ends: :meth:`read` returns b"" once ``position`` is there."""
        self._goal = total
        self._wake_reader()

    async def read(self, size: int = CHUNK) -> bytes:
        """Up to ``size`` bytes; b"" at the end: the stated one, or the guest closed the connection.

        :meth:`check_complete` tells the two apart. Raises ConnectionBroken, ClosedByUs.
        """
        while True:
            if self._greedy:
                self._greedy = False
                # A peer that always has more must not keep the loop to itself. Not behind recv: who is
                # cancelled here has taken nothing.
                await asyncio.sleep(0)
            wanted = size if self._goal is None else min(size, self._goal - self.position)
            if wanted <= 0:
                return b""
            data = await self._receive(wanted)
            if data is not None:
                self.received += len(data)
                return data

    async def ended(self) -> None:
        """Until a reader has found this connection closed, by whichever side."""
        await self._ended.wait()

    def check_complete(self) -> None:
        """Raises OutputTruncated when the end was stated and has not been reached."""
        if self._goal is not None and self.position < self._goal:
            raise OutputTruncated(
                f"{self.name}: the connection ended after {self.position} of {self._goal} bytes;"
                " the rest stays in the guest for the next attach"
            )

    async def _receive(self, size: int) -> bytes | None:
        """Some bytes, b"" when the guest has closed, None when it is to be asked again."""
        if self._first:
            data, self._first = self._first[:size], self._first[size:]
            return data
        if self.closed:
            raise ClosedByUs(f"{self.name} has been closed by this side")
        try:
            data = self._sock.recv(size)
        except (BlockingIOError, InterruptedError):
            await self._readable()
            return None
        except OSError as error:
            raise ConnectionBroken(f"{self.name}: the connection broke: {error.strerror}") from error
        if not data:
            self._ended.set()
        self._greedy = True
        return data

    async def _readable(self) -> None:
        """Until there is something to read, or :meth:`finish_at` or :meth:`close` changes what is wanted."""
        loop = asyncio.get_running_loop()
        ready, self._wake_reader = bell()
        fd = self._sock.fileno()  # of a socket the selector would have its repr, and so its addresses
        loop.add_reader(fd, self._wake_reader)
        try:
            await ready
        finally:
            self._wake_reader = _nobody
            if not self.closed:
                loop.remove_reader(fd)

    # -- input ----------------------------------------------------------------------------------

    @property
    def input_position(self) -> int:
        """Bytes of stdin given to the guest so far: the ``offset`` of ``process.close_stdin``."""
        return self.offset + self.sent

    async def write(self, data: bytes) -> None:
        """Sends all of ``data``, waiting while the process does not read.

        Raises ClosedByPeer when the process reads no more (its stdin is closed), ClosedByUs.
        """
        rest = memoryview(data)
        while rest:
            if self.closed:
                raise ClosedByUs(f"{self.name} has been closed by this side")
            try:
                count = self._sock.send(rest)
            except (BlockingIOError, InterruptedError):
                await self._writable()
                continue
            except OSError as error:
                raise ClosedByPeer(f"{self.name}: the process reads no more") from error
            self.sent += count
            rest = rest[count:]

    async def _writable(self) -> None:
        loop = asyncio.get_running_loop()
        ready, self._wake_writer = bell()
        fd = self._sock.fileno()
        loop.add_writer(fd, self._wake_writer)
        try:
            await ready
        finally:
            self._wake_writer = _nobody
            if not self.closed:
                loop.remove_writer(fd)

    # -- end ------------------------------------------------------------------------------------

    def close(self) -> None:
        """Detaches. What the guest had sent and was not read is lost to this connection."""
        if self.closed:
            return
        self.closed = True
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._sock.fileno())
        loop.remove_writer(self._sock.fileno())
        self._sock.close()
        self._ended.set()
        self._wake_reader()
        self._wake_writer()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


async def _ask_early(dialogue: Dialogue, wanted: Attach, launching: asyncio.Future[Any]) -> Attached | None:
    """None: the agent had not got so far as to know the process, which runs now. Ask again.

    Raises what :meth:`Dialogue.ask` raises; TimeoutError when no answer comes although the process runs.
    """
    loop, waiting = asyncio.get_running_loop(), True

    def it_runs(_: object) -> None:
        if waiting:
            limit.reschedule(loop.time() + _ATTACH_SECONDS)

    try:
        async with asyncio.timeout(None) as limit:
            launching.add_done_callback(it_runs)
            try:
                reply: Attached = await dialogue.ask(ATTACH, wanted)
                return reply
            finally:
                waiting = False
    except RpcError as error:
        await asyncio.wait([launching])
        if error.code is not Code.NOT_FOUND or launching.cancelled() or launching.exception() is not None:
            raise
    return None


def _nobody() -> None:
    """Nobody waits."""
