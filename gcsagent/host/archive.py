"""Tar archives to and from a guest, each over a connection of its own.

The client only carries them: :mod:`gcsagent.host.copy` makes and takes them apart. The archive ends with the
response; until that has come, nothing is known to have arrived.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from gcsagent.host.caller import answer_limit
from gcsagent.host.client import Client
from gcsagent.host.dialogue import Dialogue, answer, decode_result, despite_losses, greet
from gcsagent.host.errors import AgentSilent, HostError
from protocol.errors import RemoteProtocolError
from protocol.families.archive import (
    DATA,
    END,
    READY,
    Archived,
    ArchiveData,
    ArchiveEnd,
    GetArchive,
    PutArchive,
)
from protocol.framing import Notification, Response
from protocol.schema import SchemaError, from_wire, to_wire

CHUNK = 1 << 18
"""Bytes of an archive in one message."""

READY_SECONDS = 60.0
"""How long the guest may take to start the process that serves an archive."""


class ArchiveBroken(HostError):
    """What came is not what was sent."""


async def put_archive(
    client: Client,
    params: PutArchive,
    source: AsyncIterator[bytes],
    *,
    digest: bool = False,
    deadline: float | None = None,
) -> Archived:
    """Sends the archive that ``source`` gives; ``digest``: the guest compares its SHA-256.

    Cancelled, or when ``source`` raises, the connection is closed, and what is not whole in the guest is
    dropped there. Raises RpcError (AgentSilent some seconds behind the deadline), ConnectionLost,
    RemoteProtocolError.
    """
    async with _bounded("archive.put", deadline):
        dialogue, first = await _begin(client, "archive.put", params, deadline)
        try:
            if isinstance(first, Response):
                return _result("archive.put", first)
            return await _carry(dialogue, source, digest)
        finally:
            dialogue.close()


@asynccontextmanager
async def _bounded(method: str, deadline: float | None) -> AsyncIterator[None]:
    """Raises AgentSilent: the deadline has passed, and the agent has not said so."""
    seconds = answer_limit(method, deadline)
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        raise AgentSilent(method, seconds or 0) from None


async def _begin(
    client: Client, method: str, params: PutArchive | GetArchive, deadline: float | None
) -> tuple[Dialogue, Response | Notification]:
    """A connection, and the first that counts on it; what is lost before that is tried again."""
    async for attempt in despite_losses():
        with attempt:
            dialogue, _ = await greet(client.address, timeout=client.timeout, client_name=client.client_name)
            try:
                async with asyncio.timeout(READY_SECONDS):
                    await dialogue.send(method, params, deadline=deadline)
                    return dialogue, await _first(dialogue)
            except BaseException as error:
                dialogue.close()
                if isinstance(error, TimeoutError):
                    raise AgentSilent(method, READY_SECONDS) from None
                raise
    raise AssertionError("ends only by returning or raising")


async def _first(dialogue: Dialogue) -> Response | Notification:
    while True:
        message = await dialogue.message()
        if isinstance(message, Response) or message.method in (READY, DATA):
            return message


async def _carry(dialogue: Dialogue, source: AsyncIterator[bytes], digest: bool) -> Archived:
    sending = asyncio.create_task(_send(dialogue, source, digest))
    receiving = asyncio.create_task(_response(dialogue))
    try:
        await asyncio.wait({sending, receiving}, return_when=asyncio.FIRST_COMPLETED)
        error = sending.exception() if sending.done() and not receiving.done() else None
        if error is not None and not isinstance(error, HostError):
            raise error  # of the source
        # The guest's own words are worth more than that it takes no more.
        return _result("archive.put", await receiving)
    finally:
        for task in (sending, receiving):
            task.cancel()
        await asyncio.gather(sending, receiving, return_exceptions=True)


async def _send(dialogue: Dialogue, source: AsyncIterator[bytes], digest: bool) -> None:
    total, size = hashlib.sha256(), 0
    async for data in source:
        for start in range(0, len(data), CHUNK):
            piece = bytes(data[start : start + CHUNK])
            await dialogue.notify(DATA, {"data": piece})
        size += len(data)
        if digest:
            total.update(data)
    await dialogue.notify(END, to_wire(ArchiveEnd(size, total.hexdigest() if digest else None)))


async def _response(dialogue: Dialogue) -> Response:
    while not isinstance(message := await dialogue.message(), Response):
        pass
    return message


async def get_archive(
    client: Client,
    params: GetArchive,
    sink: Callable[[bytes], Awaitable[None]],
    *,
    deadline: float | None = None,
) -> Archived:
    """Gives ``sink`` the archive as it comes.

    Raises RpcError (AgentSilent some seconds behind the deadline), ConnectionLost, RemoteProtocolError;
    ArchiveBroken: it is not what the guest has sent.
    """
    async with _bounded("archive.get", deadline):
        return await _get(client, params, sink, deadline)


async def _get(
    client: Client,
    params: GetArchive,
    sink: Callable[[bytes], Awaitable[None]],
    deadline: float | None,
) -> Archived:
    total, size = hashlib.sha256(), 0
    dialogue, message = await _begin(client, "archive.get", params, deadline)
    try:
        while True:
            if isinstance(message, Response):
                result = _result("archive.get", message)
                break
            if message.method == DATA:
                data = _data(message.params)
                size += len(data)
                if params.digest:
                    total.update(data)
                await sink(data)
            message = await dialogue.message()
    finally:
        dialogue.close()
    if result.bytes != size or (params.digest and result.sha256 != total.hexdigest()):
        raise ArchiveBroken(f"{size} bytes have come, which are not the {result.bytes} the guest has sent")
    return result


def _data(params: dict[str, Any]) -> bytes:
    try:
        return from_wire(ArchiveData, params).data
    except SchemaError as error:
        raise RemoteProtocolError("malformed", f"{DATA}: {error}") from error


def _result(method: str, response: Response) -> Archived:
    result: Archived = decode_result(method, answer(response))
    return result
