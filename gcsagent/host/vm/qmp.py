"""A small QMP client: QEMU's monitor protocol, JSON objects one per line (QEMU docs, interop/qmp-spec).

It speaks over a socket that is already connected: the launcher gives QEMU one end of a socketpair, so
there is no path to race for and end of file means that QEMU is gone. QEMU's answers are bounded in size
and in time.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gcsagent.host.vm.errors import QmpClosed, QmpError

_MAX_MESSAGE_BYTES = 1 << 20

# What a UNIX socket takes as a whole or not at all, with much to spare.
_MAX_COMMAND_BYTES = 1 << 15


@dataclass(frozen=True, slots=True)
class QmpEvent:
    """An asynchronous message from QEMU, such as SHUTDOWN or GUEST_PANICKED."""

    name: str
    data: Mapping[str, Any]


class _Reader(asyncio.StreamReader):
    """Ends like at end of file where the connection is reset: a QEMU that exits with a command unread does
    that, and what it said before, such as why, must not be lost."""

    def set_exception(self, exc: BaseException) -> None:
        self.feed_eof()


class QmpClient:
    """One monitor connection. Commands may overlap; each has a deadline."""

    def __init__(
        self,
        sock: socket.socket,
        reader: asyncio.StreamReader,
        transport: asyncio.BaseTransport,
        on_event: Callable[[QmpEvent], None],
    ) -> None:
        self._sock = sock
        self._reader = reader
        self._transport = transport
        self._on_event = on_event
        self._ids = itertools.count(1)
        self._pending: dict[int, asyncio.Future[Any]] = {}
        self._closed: QmpError | None = None
        self._task: asyncio.Task[None] | None = None

    @classmethod
    async def open(
        cls, sock: socket.socket, on_event: Callable[[QmpEvent], None], *, timeout: float = 30.0
    ) -> QmpClient:
        """Takes over `sock`, waits for QEMU's greeting and leaves negotiation mode.

        Raises:
            QmpError: no or a wrong greeting within `timeout` seconds.
        """
        loop = asyncio.get_running_loop()
        reader = _Reader(limit=_MAX_MESSAGE_BYTES, loop=loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        transport, _ = await loop.create_unix_connection(lambda: protocol, sock=sock)
        client = cls(sock, reader, transport, on_event)
        try:
            async with asyncio.timeout(timeout):
                greeting = await client._receive()
            if "QMP" not in greeting:
                raise QmpError("the monitor did not greet with QMP")
            client._task = asyncio.create_task(client._read(), name="qmp")
            await client.execute("qmp_capabilities", timeout=timeout)
        except TimeoutError:
            client.close()
            raise QmpError(f"QEMU's monitor said nothing for {timeout:g} s") from None
        except BaseException:
            client.close()
            raise
        return client

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        fd: int | None = None,
        timeout: float = 10.0,
    ) -> Any:
        """Runs one command and returns what QEMU returned.

        Args:
            fd: descriptor that QEMU gets a copy of with the command, which is then getfd.
            timeout: seconds.

        Raises:
            QmpClosed: the connection ended before the answer.
            QmpError: QEMU answered with an error, or not within `timeout` seconds.
        """
        if self._closed is not None:
            raise self._closed
        number = next(self._ids)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._pending[number] = answer
        message = {"execute": command, "arguments": dict(arguments or {}), "id": number}
        try:
            async with asyncio.timeout(timeout):
                self._send(json.dumps(message).encode() + b"\n", fd)
                return await answer
        except TimeoutError:
            raise QmpError(f"QEMU did not answer {command} within {timeout:g} s") from None
        except OSError as error:
            raise QmpClosed(f"QEMU's monitor is gone: {error}") from error
        finally:
            del self._pending[number]

    def _send(self, line: bytes, fd: int | None) -> None:
        if len(line) > _MAX_COMMAND_BYTES:
            raise QmpError(f"a command of {len(line)} bytes is too long for QEMU's monitor")
        # Not by the transport: one that cannot write stops reading, too, and so loses what QEMU said of its
        # end; nor can it send descriptors.
        try:
            if fd is None:
                self._sock.send(line)
            else:
                socket.send_fds(self._sock, [line], [fd])
        except BlockingIOError:
            raise QmpError("QEMU does not read its monitor") from None

    @property
    def closed(self) -> bool:
        """Whether no command can be answered any more."""
        return self._closed is not None

    async def finished(self, timeout: float) -> None:
        """Returns once QEMU has closed its end and all events are delivered, or after `timeout` seconds."""
        if self._task is not None:
            await asyncio.wait([self._task], timeout=timeout)

    def close(self) -> None:
        """Drops the connection; commands in flight fail with QmpClosed."""
        if self._task is not None:
            self._task.cancel()
        self._end(QmpClosed("the monitor connection was closed"))

    async def _read(self) -> None:
        try:
            while True:
                self._dispatch(await self._receive())
        except QmpError as error:
            self._end(error)

    async def _receive(self) -> dict[str, Any]:
        try:
            line = await self._reader.readline()
        except ValueError:
            raise QmpError(f"QEMU sent a message of more than {_MAX_MESSAGE_BYTES} bytes") from None
        except OSError as error:
            raise QmpClosed(f"QEMU's monitor is gone: {error}") from error
        if not line.endswith(b"\n"):
            raise QmpClosed("QEMU closed its monitor")
        try:
            message = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise QmpError(f"QEMU sent something that is not JSON: {line[:80]!r}") from error
        if not isinstance(message, dict):
            raise QmpError(f"QEMU sent something that is not an object: {line[:80]!r}")
        return message

    def _dispatch(self, message: dict[str, Any]) -> None:
        if isinstance(message.get("event"), str):
            data = message.get("data")
            self._on_event(QmpEvent(message["event"], data if isinstance(data, dict) else {}))
            return
        ident = message.get("id")
        answer = self._pending.get(ident) if isinstance(ident, int) else None
        # An answer that nobody waits for any more belongs to a command whose deadline has passed.
        if answer is None or answer.done():
            return
        if "error" in message:
            answer.set_exception(QmpError(f"QEMU refused: {_description(message['error'])}"))
        else:
            answer.set_result(message.get("return"))

    def _end(self, error: QmpError) -> None:
        if self._closed is None:
            self._closed = error
        for answer in self._pending.values():
            if not answer.done():
                answer.set_exception(error)
        with contextlib.suppress(RuntimeError):
            self._transport.close()


def _description(error: object) -> str:
    return str(error.get("desc", error)) if isinstance(error, dict) else str(error)
