"""What cancelling and closing leave of a client: no byte lost, no connection that nobody closes, no hang."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gcsagent.host import caller
from gcsagent.host.archive import get_archive, put_archive
from gcsagent.host.client import Client
from gcsagent.host.errors import AgentSilent
from gcsagent.host.forward import ForwardStream
from gcsagent.host.streams import Stream
from protocol.families.agent import Pong
from protocol.families.archive import GetArchive, PutArchive
from protocol.families.container import CreateContainer
from protocol.families.forward import ForwardOpened
from tests.fakes.fake_agent import FakeAgent, with_client


def pair() -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    return ours, theirs


def test_a_cancelled_read_of_a_stream_takes_nothing() -> None:
    async def scenario() -> None:
        ours, theirs = pair()
        with theirs, contextlib.closing(Stream("stdout", ours, 0)) as stream:
            for word in (b"first", b"second"):
                theirs.send(word)
                reading = asyncio.create_task(stream.read())
                await asyncio.sleep(0)
                reading.cancel()
                taken = (await asyncio.gather(reading, return_exceptions=True))[0]
                assert word == (taken if isinstance(taken, bytes) else await stream.read())
            assert stream.position == len(b"firstsecond")

    asyncio.run(scenario())


def test_closing_does_not_wait_for_an_agent_that_takes_nothing(tmp_path: Path) -> None:
    async def body(agent: FakeAgent, client: Client) -> None:
        agent.handlers["agent.ping"] = lambda params: Pong(1, 5, 7)
        await client.ping()
        for served in agent.connections:
            served.reader._transport.pause_reading()  # type: ignore[attr-defined]
        large = CreateContainer("c", spec={"x": "y" * 900_000})
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.create_container(large), 0.1)
        async with asyncio.timeout(10):
            await client.aclose()

    with_client(tmp_path, body)


def test_a_cancelled_read_of_a_forward_still_learns_of_its_end(tmp_path: Path) -> None:
    """The guest has closed the connection, and has not said yet where the end was."""

    async def body(agent: FakeAgent, client: Client) -> None:
        said = asyncio.Event()

        async def wait(params: Any) -> dict[str, Any]:
            await said.wait()
            return {"bytes": 0, "errno": 0}

        agent.handlers["forward.wait"] = wait
        ours, theirs = pair()
        theirs.close()
        opened = ForwardOpened("f1", "tcp:80")
        async with ForwardStream(client, Stream("tcp:80", ours, 0), opened) as remote:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(remote.read(), 0.05)
            said.set()
            async with asyncio.timeout(5):
                assert await remote.read() == b""

    with_client(tmp_path, body)


@pytest.mark.parametrize("way", ["archive.put", "archive.get"])
def test_an_archive_has_its_deadline_though_the_agent_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(caller, "GRACE_SECONDS", 0.1)

    async def nothing_comes() -> AsyncIterator[bytes]:
        await asyncio.Event().wait()
        yield b""

    async def sink(data: bytes) -> None:
        raise AssertionError(data)

    async def hang(params: Any) -> None:
        await asyncio.Event().wait()

    async def body(agent: FakeAgent, client: Client) -> None:
        agent.handlers["archive.get"] = hang
        work = (
            put_archive(client, PutArchive(path="/x"), nothing_comes(), deadline=0.1)
            if way == "archive.put"
            else get_archive(client, GetArchive("/x"), sink, deadline=0.1)
        )
        async with asyncio.timeout(10):
            with pytest.raises(AgentSilent, match=f"no answer to {way} in 0.2 s"):
                await work

    with_client(tmp_path, body)
