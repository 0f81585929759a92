"""One control connection shared by any number of tasks: requests out, answers sorted back to who asked."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from gcsagent.host.dialogue import Dialogue, answer
from gcsagent.host.errors import ClosedByPeer, ClosedByUs, ConnectionBroken, ConnectionLost
from protocol.connection import State
from protocol.errors import Code, ProtocolError, RemoteProtocolError, RpcError
from protocol.framing import Message, Response
from protocol.limits import MAX_MSGID
from protocol.methods import CANCEL, Cancel
from protocol.schema import to_wire

_CHUNK = 65536

_FLUSH_SECONDS = 1.0
"""For what is left to be sent when a link is closed; an agent that hangs takes none of it."""


class Link:
    """A greeted connection. ``lost`` is None while it can be used, then why it cannot."""

    def __init__(
        self, dialogue: Dialogue, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._connection = dialogue.connection
        self._reader = reader
        self._writer = writer
        self._waiting: dict[int, asyncio.Future[Response]] = {}
        self._abandoned: set[int] = set()  # cancelled by us and not answered yet: their ids are not free
        self._last_id = 0
        self.lost: ConnectionLost | RemoteProtocolError | None = None
        self._task = asyncio.create_task(self._read(), name="gcs-link")

    @classmethod
    async def over(cls, dialogue: Dialogue) -> Link:
        """Goes on with a greeted dialogue; its socket is the link's from here on."""
        try:
            reader, writer = await asyncio.open_connection(sock=dialogue.sock)
        except BaseException:
            dialogue.close()
            raise
        return cls(dialogue, reader, writer)

    async def call(self, method: str, params: dict[str, Any]) -> Any:
        """The bare result of one request. Cancelling the caller sends ``rpc.cancel``.

        Raises:
            RpcError: the agent's answer, or RESOURCE_EXHAUSTED when too much is outstanding.
            ConnectionLost, RemoteProtocolError: no answer will come.
            LocalProtocolError: the request cannot be sent (too large).
        """
        if self.lost is not None:
            raise self._why()
        most = self._connection.peer.max_in_flight
        if self._connection.outstanding >= most:
            raise RpcError(
                Code.RESOURCE_EXHAUSTED,
                f"{most} requests are outstanding (max_in_flight); wait for some to end",
                limit="max_in_flight",
                value=most,
            )
        msgid = self._next_id()
        frame = self._connection.request(msgid, method, params)
        future: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        self._waiting[msgid] = future
        try:
            self._writer.write(frame)
            await self._drain()
            return answer(await future)
        except asyncio.CancelledError:
            if not future.done() or future.cancelled():
                self._abandon(msgid)
            raise
        finally:
            del self._waiting[msgid]
            if future.done() and not future.cancelled():
                future.exception()  # seen, even where something else is being raised

    async def close(self) -> None:
        """Ends it; calls still outstanding fail with ClosedByUs."""
        self._end(ClosedByUs("the connection was closed by this side"))
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        closing = asyncio.ensure_future(self._writer.wait_closed())
        try:
            await asyncio.wait((closing,), timeout=_FLUSH_SECONDS)
        finally:
            self._writer.transport.abort()
        with contextlib.suppress(OSError):
            await closing

    def _next_id(self) -> int:
        while True:
            self._last_id = self._last_id % MAX_MSGID + 1
            if self._last_id not in self._waiting and self._last_id not in self._abandoned:
                return self._last_id

    async def _drain(self) -> None:
        try:
            await self._writer.drain()
        except OSError as error:
            self._end(ConnectionBroken(f"the connection to the agent broke: {error.strerror or error}"))
            raise self._why() from error

    def _abandon(self, msgid: int) -> None:
        if self.lost is None:
            self._abandoned.add(msgid)
            self._writer.write(self._connection.notify(CANCEL, to_wire(Cancel(msgid))))

    async def _read(self) -> None:
        try:
            while data := await self._reader.read(_CHUNK):
                for message in self._connection.receive(data):
                    self._dispatch(message)
                if self._connection.state is State.CLOSED:
                    self._connection.receive(b"")  # raises what was wrong behind the last good message
            self._end(ClosedByPeer("the agent closed the connection"))
        except RemoteProtocolError as error:
            if error.kind != "peer":
                self._writer.write(self._connection.farewell(error))
            self._end(error)
        except OSError as error:
            self._end(ConnectionBroken(f"the connection to the agent broke: {error.strerror or error}"))
        except ProtocolError as error:  # closed by us between two messages
            self._end(ClosedByUs(str(error)))

    def _dispatch(self, message: Message) -> None:
        # Notifications: this connection has subscribed to nothing, and what it does not know it ignores.
        if isinstance(message, Response):
            self._abandoned.discard(message.msgid)
            future = self._waiting.get(message.msgid)
            if future is not None and not future.done():
                future.set_result(message)

    def _end(self, reason: ConnectionLost | RemoteProtocolError) -> None:
        if self.lost is not None:
            return
        self.lost = reason
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(self._why())
        self._writer.close()

    def _why(self) -> ConnectionLost | RemoteProtocolError:
        """A fresh copy of ``lost``: one exception raised in many tasks would collect their tracebacks."""
        assert self.lost is not None
        if isinstance(self.lost, RemoteProtocolError):
            return RemoteProtocolError(self.lost.kind, self.lost.message)
        return type(self.lost)(*self.lost.args)
