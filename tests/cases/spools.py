"""Spools on both tiers: kept while nobody reads, and the same bytes for whoever comes back."""

from __future__ import annotations

import asyncio
import hashlib

from gcsagent.host.spool import SpoolStream
from protocol.errors import Code
from protocol.families.stream import StreamName
from protocol.types import Stdio, StreamMode, StreamSpec, WhenFull
from tests.cases import pattern
from tests.cases.target import MIB, Target, case, connect, created, event, refused, running

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
async def a_tee_is_a_log_and_a_stream_that_loses_nothing(target: Target) -> None:
    size, tee = 2 * MIB, StreamSpec(StreamMode.SPOOL, LIMIT, tee=True)
    async with (
        await connect(target) as client,
        await client.events() as events,
        created(target, client, *pattern.command(f"write(1, 23, {size})"), stdio=Stdio(stdout=tee)) as init,
    ):
        out = init.streams["stdout"]
        assert isinstance(out, SpoolStream)
        await init.start()
        with refused(Code.FAILED_PRECONDITION):
            await client.attach(init.container)
        async with await client.attach_spool(
            init.container, "init", STDOUT, acknowledge=False, passive=True
        ) as along:
            assert await along.read(1000) == pattern.take(23, 0, 1000)
        # Nobody reads: the process is held up before anything that was not sent has to go.
        state = (await client.process_state(init.container, "init")).streams["stdout"]
        assert (state.attached, state.when_full, state.ended) == (True, WhenFull.DROP_OLDEST, False)
        total = hashlib.sha256()
        while out.position < size:
            total.update(await out.read())
        assert (total.hexdigest(), out.dropped) == (pattern.digest(23, size), 0)
        assert (await event(events, "stream.end", init.container)).data["bytes"] == size
        found = await client.find_in_stream(init.container, "init", STDOUT, tail=0)
        assert (found.first, found.end) == (size - LIMIT, size)


@case
async def a_tee_nobody_is_attached_to_holds_nothing_up(target: Target) -> None:
    size, tee = 2 * MIB, StreamSpec(StreamMode.SPOOL, LIMIT, tee=True)
    async with (
        await connect(target) as client,
        await client.events() as events,
        created(target, client, *pattern.command(f"write(1, 24, {size})"), stdio=Stdio(stdout=tee)) as init,
    ):
        await init.start()
        init.detach()
        assert (await event(events, "stream.end", init.container)).data["bytes"] == size
        with refused(Code.INVALID_ARGUMENT, field="stdio.stdout.tee"):
            wrong = StreamSpec(StreamMode.SPOOL, when_full=WhenFull.BLOCK, tee=True)
            async with created(target, client, "true", stdio=Stdio(stdout=wrong), attached=False):
                pass


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
