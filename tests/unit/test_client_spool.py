"""The client's spool: it counts, acknowledges what was dealt with, and comes back when it is cut off."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from gcsagent.host.client import Client
from gcsagent.host.errors import ClosedByUs, ConnectFailed
from gcsagent.host.spool import ACK_BYTES, SpoolStream
from protocol.errors import Code, RpcError
from protocol.families.stream import Ack, StreamName
from protocol.method import Empty
from tests.fakes.fake_agent import FakeAgent

DATA = bytes(range(256)) * 2000
STDOUT = StreamName.STDOUT


class Spooling:
    """A fake agent's spool of DATA: it sends from the offset asked for, ``burst`` bytes a connection."""

    def __init__(self, agent: FakeAgent, burst: int) -> None:
        self.agent, self.burst = agent, burst
        self.acks: list[int] = []
        self.refusal: RpcError | None = None
        agent.offsets = _Asked(agent)
        agent.streams["stdout"] = self._send
        agent.handlers["stream.ack"] = self._ack

    def _ack(self, params: Ack) -> Empty:
        self.acks.append(params.offset)
        if self.refusal is not None:
            raise self.refusal
        return Empty()

    async def _send(self, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        start = self.agent.offsets["stdout"]
        writer.write(DATA[start : start + self.burst])
        await writer.drain()


class _Asked(dict[str, int]):
    """Offsets as the last attach wanted them."""

    def __init__(self, agent: FakeAgent) -> None:
        super().__init__()
        self._agent = agent

    def get(self, _name: str, default: Any = 0) -> Any:
        return self._agent.named("stream.attach")[-1].get("offset", default)

    def __getitem__(self, name: str) -> int:
        return int(self.get(name))


def with_spool(
    tmp_path: Path, body: Callable[[Spooling, SpoolStream], Awaitable[None]], burst: int = 70_000
) -> None:
    async def scenario() -> None:
        async with (
            asyncio.timeout(20),
            FakeAgent(tmp_path / "gcs.sock") as agent,
            await Client.connect(agent.address, timeout=5) as client,
        ):
            spooling = Spooling(agent, burst)
            stream = await client.attach_spool("c", "init", STDOUT, acknowledge=True)
            async with stream:
                await body(spooling, stream)

    asyncio.run(scenario())


async def everything(stream: SpoolStream) -> bytes:
    data = b""
    while chunk := await stream.read():
        data += chunk
    return data


def test_cut_off_again_and_again_it_goes_on_where_it_was(tmp_path: Path) -> None:
    async def body(spooling: Spooling, stream: SpoolStream) -> None:
        stream.finish_at(len(DATA))
        assert await everything(stream) == DATA
        attached = spooling.agent.named("stream.attach")
        assert len(attached) == -(-len(DATA) // 70_000)
        assert "offset" not in attached[0]
        assert [asked["offset"] for asked in attached[1:]] == list(range(70_000, len(DATA), 70_000))
        assert all(asked["take"] for asked in attached[1:])
        assert stream.position == len(DATA)

    with_spool(tmp_path, body)


def test_it_acknowledges_what_was_dealt_with_and_in_the_end_all(tmp_path: Path) -> None:
    async def body(spooling: Spooling, stream: SpoolStream) -> None:
        data = await stream.read(ACK_BYTES)
        while len(data) < ACK_BYTES:
            data += await stream.read(ACK_BYTES - len(data))
        assert spooling.acks == []  # returned, and for all we know not dealt with
        data += await stream.read(1)
        stream.finish_at(len(DATA))
        assert data + await everything(stream) == DATA
        assert spooling.acks[0] >= ACK_BYTES
        assert spooling.acks == sorted(set(spooling.acks))
        assert spooling.acks[-1] == len(DATA)

    with_spool(tmp_path, body, burst=len(DATA))


def test_an_acknowledgement_that_is_refused_is_no_error_of_the_reader(tmp_path: Path) -> None:
    async def body(spooling: Spooling, stream: SpoolStream) -> None:
        spooling.refusal = RpcError(Code.NOT_FOUND, "there is no container c")
        stream.finish_at(len(DATA))
        assert await everything(stream) == DATA
        assert spooling.acks

    with_spool(tmp_path, body)


def test_a_refused_attach_and_a_closed_stream_are_errors(tmp_path: Path) -> None:
    async def body(spooling: Spooling, stream: SpoolStream) -> None:
        del spooling.agent.streams["stdout"]
        with pytest.raises(RpcError) as caught:
            await everything(stream)
        assert caught.value.code is Code.FAILED_PRECONDITION
        assert stream.position == 70_000
        stream.close()
        with pytest.raises(ClosedByUs):
            await stream.read()

    with_spool(tmp_path, body)


def test_an_agent_that_does_not_come_back_is_an_error(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with asyncio.timeout(20), FakeAgent(tmp_path / "gcs.sock") as agent:
            client = await Client.connect(agent.address, timeout=0.3)
            Spooling(agent, 10)
            stream = await client.attach_spool("c", "init", STDOUT, acknowledge=True)
            assert await stream.read() == DATA[:10]
        with pytest.raises(ConnectFailed):
            await stream.read()
        stream.close()
        await client.aclose()

    asyncio.run(scenario())


def test_closing_ends_a_read_that_waits_for_an_agent(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with asyncio.timeout(20):
            async with FakeAgent(tmp_path / "gcs.sock") as agent:
                client = await Client.connect(agent.address, timeout=1000)
                Spooling(agent, 10)
                stream = await client.attach_spool("c", "init", STDOUT, acknowledge=True)
                assert await stream.read() == DATA[:10]
            reading = asyncio.create_task(stream.read())
            await asyncio.sleep(0.05)  # it dials
            stream.close()
            with pytest.raises(ClosedByUs):
                await reading
            await client.aclose()

    asyncio.run(scenario())
