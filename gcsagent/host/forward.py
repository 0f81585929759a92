"""Connections through the agent to what listens in the guest or in a container.

A :class:`ForwardStream` is one such connection. Its ends are numbers of bytes on the control connection and
never a close: that is what makes half-close work over every transport.

A :class:`Forwarder` gives each connection to a local socket a forward of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import struct
from collections.abc import Callable
from typing import Self

from tenacity import AsyncRetrying, retry_if_exception, wait_random_exponential

from gcsagent.host.client import Client
from gcsagent.host.closing import Closing
from gcsagent.host.dialogue import despite_losses, encode_params, greet
from gcsagent.host.errors import AgentSilent, ClosedByPeer, ClosedByUs, ConnectionBroken, HostError
from gcsagent.host.process import first_error
from gcsagent.host.streams import CHUNK, Stream
from gcsagent.listening import BACKLOG, listen_unix
from protocol.errors import ProtocolError, RpcError
from protocol.families.forward import CloseWrite, ForwardEnd, ForwardOpened, ForwardRef, OpenForward

OPEN_SECONDS = 15.0
"""How long opening may take in all; the agent's own limit is 10 s."""

PER_CONTROL = 100
"""Forwards that share a control connection: each has up to two requests waiting there, of 256."""

_RESET = struct.pack("ii", 1, 0)
_OPEN = "forward.open"


class TargetBroke(HostError):
    """The target's connection ended with an error; ``errno`` is the guest's."""

    def __init__(self, number: int) -> None:
        super().__init__(f"the target's connection broke: {os.strerror(number)}")
        self.errno = number


class ForwardStream(Closing):
    """One connection to a target. One task may read while another writes."""

    def __init__(self, client: Client, stream: Stream, opened: ForwardOpened) -> None:
        """Use :meth:`open`. ``ident`` is the agent's name for it."""
        self.to, self.ident = opened.to, opened.forward
        self._client, self._stream = client, stream
        self._waiting = asyncio.ensure_future(self._wait())

    @classmethod
    async def open(cls, client: Client, target: OpenForward) -> Self:
        """Connects; ``client`` is the control connection to use and outlives this.

        A server whose queue of connections is full is tried again for OPEN_SECONDS in all. Raises RpcError
        (``details["errno"]`` says why), ConnectFailed, ConnectionLost, AgentSilent.
        """
        encode_params(_OPEN, target)
        try:
            async with asyncio.timeout(OPEN_SECONDS):
                async for attempt in AsyncRetrying(
                    retry=retry_if_exception(_queue_is_full),
                    wait=wait_random_exponential(multiplier=0.02, max=1.0),
                ):
                    with attempt:
                        return await cls._open(client, target)
        except TimeoutError:
            raise AgentSilent(_OPEN, OPEN_SECONDS) from None
        raise AssertionError("ends only by returning or raising")

    @classmethod
    async def _open(cls, client: Client, target: OpenForward) -> Self:
        agents: list[int] = []  # those that were met; each may be killed over it
        async for attempt in despite_losses(lambda: agents[-1] if agents else None):
            with attempt:
                dialogue, welcome = await greet(
                    client.address, timeout=client.timeout, client_name=client.client_name
                )
                agents.append(welcome.generation)
                try:
                    opened: ForwardOpened = await dialogue.ask(_OPEN, target)
                    first = dialogue.connection.stream_bytes()
                except BaseException:
                    dialogue.close()
                    raise
                return cls(client, Stream(opened.to, dialogue.sock, 0, first), opened)
        raise AssertionError("ends only by returning or raising")

    async def read(self, size: int = CHUNK) -> bytes:
        """Up to ``size`` bytes; b"" at the end of what the target sends.

        Raises TargetBroke, ConnectionBroken when the agent or the guest is lost, ClosedByUs.
        """
        data = await self._stream.read(size)
        if not data:
            end = await self._ended()
            if self._stream.position < end.bytes:
                raise ConnectionBroken(f"{self.to}: {end.bytes - self._stream.position} bytes were lost")
            if end.errno:
                raise TargetBroke(end.errno)
        return data

    async def write(self, data: bytes) -> None:
        """Sends all of ``data``, waiting while the target does not read. Raises ClosedByPeer, ClosedByUs."""
        await self._stream.write(data)

    async def close_write(self) -> None:
        """Ends what the target receives; returns when it has all of it, or takes no more."""
        params = CloseWrite(self.ident, self._stream.sent)
        await self._client.call("forward.close_write", params)

    async def _ended(self) -> ForwardEnd:
        await asyncio.wait((self._waiting,))  # itself it would be cancelled with a reader
        if self._waiting.cancelled():
            raise ClosedByUs(f"{self.to} has been closed by this side")
        return self._waiting.result()

    async def _wait(self) -> ForwardEnd:
        try:
            end: ForwardEnd = await self._client.call("forward.wait", ForwardRef(self.ident))
        except BaseException:
            self._stream.finish_at(0)
            raise
        self._stream.finish_at(end.bytes)
        return end

    async def aclose(self) -> None:
        """Lets the connection go. Unless both ways have ended, the target sees its own reset."""
        self._stream.close()
        self._waiting.cancel()
        await asyncio.gather(self._waiting, return_exceptions=True)


def _queue_is_full(error: BaseException) -> bool:
    return isinstance(error, RpcError) and error.details.get("errno") == errno.EAGAIN


async def relay(local: socket.socket, remote: ForwardStream) -> None:
    """Moves bytes both ways until both have ended. Raises OSError for the local side, HostError, RpcError."""
    with first_error():
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_up(local, remote))
            tasks.create_task(_down(local, remote))


async def _up(local: socket.socket, remote: ForwardStream) -> None:
    loop = asyncio.get_running_loop()
    with contextlib.suppress(ClosedByPeer):  # reading finds out what became of it
        while data := await loop.sock_recv(local, CHUNK):
            await remote.write(data)
        await remote.close_write()


async def _down(local: socket.socket, remote: ForwardStream) -> None:
    loop = asyncio.get_running_loop()
    while data := await remote.read():
        await loop.sock_sendall(local, data)
    with contextlib.suppress(OSError):  # it has left already
        local.shutdown(socket.SHUT_WR)


class Controls:
    """Control connections, each shared by at most PER_CONTROL forwards."""

    def __init__(self, client: Client) -> None:
        """``client`` is the first; it stays the caller's."""
        self._first = client
        self._shares: dict[Client, int] = {client: 0}
        self._making = asyncio.Lock()

    async def take(self) -> Client:
        async with self._making:
            found = next((each for each, count in self._shares.items() if count < PER_CONTROL), None)
            if found is None:
                first = self._first
                found = await Client.connect(
                    first.address, timeout=first.timeout, client_name=first.client_name
                )
            self._shares[found] = self._shares.get(found, 0) + 1
            return found

    async def give_back(self, client: Client) -> None:
        self._shares[client] -= 1
        if not self._shares[client] and client is not self._first:
            del self._shares[client]
            await client.aclose()


class Forwarder:
    """Serves a listening socket until :meth:`aclose`; ``report`` gets each connection's error."""

    def __init__(
        self,
        controls: Controls,
        listener: socket.socket,
        target: OpenForward,
        report: Callable[[Exception], None],
    ) -> None:
        self._controls, self._listener, self._target, self._report = controls, listener, target, report
        listener.setblocking(False)
        self._tasks: set[asyncio.Task[None]] = set()
        self._accepting = asyncio.ensure_future(self._accept())

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                local, _ = await loop.sock_accept(self._listener)
            except OSError as error:  # out of descriptors: wait until one of ours is given back
                self._report(error)
                if not self._tasks:
                    raise
                await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
                continue
            task = asyncio.create_task(self._serve(local))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, local: socket.socket) -> None:
        with local:
            if local.family != socket.AF_UNIX:
                local.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                await self._forward(local)
            except (HostError, ProtocolError, RpcError, OSError) as error:
                # Not an end in order: who reads the rest must not take it for the whole.
                with contextlib.suppress(OSError):
                    local.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                if not _left(error):
                    self._report(error)

    async def _forward(self, local: socket.socket) -> None:
        client = await self._controls.take()
        try:
            async with await ForwardStream.open(client, self._target) as remote:
                await relay(local, remote)
        finally:
            await self._controls.give_back(client)

    async def failed(self) -> None:
        """Until it accepts no more, which raises why (OSError)."""
        await self._accepting

    async def aclose(self) -> None:
        """Stops listening and ends every connection."""
        tasks = [self._accepting, *self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._listener.close()


def _left(error: Exception) -> bool:
    """The local client has gone, as it may."""
    return isinstance(error, BrokenPipeError | ConnectionResetError)


def listen(where: str | tuple[str, int]) -> socket.socket:
    """A listening socket at a path or (address, port), port 0 for any free one. Raises OSError.

    A socket file at the path gives way if nobody listens on it; nothing else does.
    """
    if isinstance(where, tuple):
        found = socket.getaddrinfo(*where, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        return socket.create_server(
            (str(address[0]), int(address[1])), family=socket.AddressFamily(family), backlog=BACKLOG
        )
    return listen_unix(where)
