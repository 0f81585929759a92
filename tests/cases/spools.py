"""Spools on both tiers: kept while nobody reads, and the same bytes for whoever comes back."""

from __future__ import annotations

import asyncio
import hashlib

from gcsagent.host.spool import SpoolStream
from protocol.families.stream import StreamName
from protocol.types import Stdio, StreamMode, StreamSpec, WhenFull
from tests.cases import pattern
from tests.cases.target import MIB, Target, case, connect, created, event, running

LIMIT = 256 << 10
STDOUT = StreamName.STDOUT


@case
async def a_spool_gives_every_byte_once_over_lost_connections(target: Target) -> None:
    size = 2 * MIB
    stdio = Stdio(stdout=StreamSpec(StreamMode.SPOOL, LIMIT))
    async with (
        await connect(target) as client,
        created(target, client, *pattern.command(f"write(1, 21, {size})"), stdio=stdio) as init,
    ):
        out = init.streams["stdout"]
        assert isinstance(out, SpoolStream)
        await init.start()
        waiting = asyncio.create_task(init.wait())
        total, cut_at, cuts = hashlib.sha256(), 1, 0
        while data := await out.read():
            total.update(data)
            if out.position >= cut_at:
                out._sock.shutdown(2)
                cuts, cut_at = cuts + 1, out.position + size // 5
        assert cuts >= 4
        assert total.hexdigest() == pattern.digest(21, size)
        record = await waiting
        assert (record.exit_code, record.streams["stdout"]) == (0, size)


@case
async def a_log_keeps_the_newest_bytes(target: Target) -> None:
    size = MIB
    stdio = Stdio(stdout=StreamSpec(StreamMode.SPOOL, LIMIT, WhenFull.DROP_OLDEST))
    async with (
        await connect(target) as client,
        await client.events() as events,
        running(
            target, client, *pattern.command(f"write(1, 22, {size})"), stdio=stdio, attached=False
        ) as init,
    ):
        assert (await event(events, "stream.end", init.container)).data["bytes"] == size
        for offset, dropped in ((0, size - LIMIT), (size - 1000, 0)):
            async with await client.attach_spool(
                init.container, "init", STDOUT, offset=offset, acknowledge=False
            ) as out:
                out.finish_at(size)
                found = bytearray()
                while data := await out.read():
                    found += data
                assert bytes(found) == pattern.take(22, offset + dropped, size)
                assert out.dropped == dropped
        found_at = await client.find_in_stream(init.container, "init", STDOUT, tail=0)
        assert (found_at.offset, found_at.first, found_at.end) == (size, size - LIMIT, size)
