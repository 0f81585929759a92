"""Spools: what they keep, what they give again, and that neither kill nor lost connection changes a byte."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gcsagent.host.client import Client
from gcsagent.host.process import RemoteProcess
from gcsagent.host.spool import SpoolStream
from gcsagent.host.streams import Stream
from protocol.errors import Code, RpcError
from protocol.families.stream import StreamName
from protocol.types import ProcessState, Stdio, StreamMode, StreamSpec, WhenFull
from tests.cases import pattern
from tests.cases.agents import REPO, RunningAgent, stopped_clean
from tests.cases.target import MIB, Target, connect, created, creation, event, name, refused, remove, running

STDOUT = StreamName.STDOUT
SMALL = 256 << 10
SECONDS = 100.0


def spool(limit: int, when_full: WhenFull = WhenFull.BLOCK) -> StreamSpec:
    return StreamSpec(StreamMode.SPOOL, limit, when_full)


def log(limit: int = 1 << 20) -> StreamSpec:
    return spool(limit, WhenFull.DROP_OLDEST)


@pytest.fixture(scope="module")
def own() -> Iterator[RunningAgent]:
    """Its end is a test: nothing is left of any spool."""
    yield from stopped_clean(RunningAgent())


@pytest.fixture
def target(own: RunningAgent, rootfs: str) -> Target:
    return Target(own.address, rootfs, box="box", pace=1.0, execs=1)


def play(body: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(SECONDS):
            await body()

    asyncio.run(bounded())


async def state_when(client: Client, container: str, holds: Callable[[ProcessState], bool]) -> ProcessState:
    """The state of init once that is true of it. What is waited for has no event of its own."""
    async with asyncio.timeout(20.0):
        while not holds(state := await client.process_state(container)):  # noqa: ASYNC110 - see above
            await asyncio.sleep(0.01)
    return state


async def digest_of(stream: Stream, client: Client | None = None, container: str = "") -> str:
    """SHA-256 of everything to the stated end; with ``client`` the bytes are acknowledged as they come."""
    total, acked = hashlib.sha256(), 0
    while data := await stream.read(MIB):
        total.update(data)
        if client is not None and stream.position - acked >= 1 << 16:
            acked = stream.position
            await client.ack_stream(container, "init", STDOUT, acked)
    stream.check_complete()
    return total.hexdigest()


# -- block ------------------------------------------------------------------------------------------


def test_a_full_spool_blocks_its_writer_and_is_replayed_from_any_offset(target: Target) -> None:
    size = 3 * MIB

    async def body() -> None:
        command = pattern.command(f"write(1, 1, {size})")
        async with (
            await connect(target) as client,
            running(target, client, *command, stdio=Stdio(stdout=spool(SMALL)), attached=False) as init,
        ):
            state = await state_when(client, init.container, lambda s: s.streams["stdout"].bytes == SMALL)
            assert state.streams["stdout"].first == 0
            assert state.exit is None
            for offset in (0, 100_001, SMALL):
                async with await client.attach(init.container, offset=offset) as out:
                    out.finish_at(SMALL)
                    found = b"".join([data async for data in pieces(out)])
                    assert found == pattern.take(1, offset, SMALL)
            with refused(Code.FAILED_PRECONDITION):
                await client.attach(init.container, offset=SMALL + 1)
            await client.ack_stream(init.container, "init", STDOUT, 70_000)
            await client.ack_stream(init.container, "init", STDOUT, 50_000)  # less than before: nothing
            await state_when(client, init.container, lambda s: s.streams["stdout"].bytes == SMALL + 70_000)
            with pytest.raises(RpcError) as gone:
                await client.attach(init.container, offset=69_999)
            details = gone.value.details
            assert (details["first"], details["end"], details["dropped"]) == (70_000, SMALL + 70_000, 1)
            with refused(Code.FAILED_PRECONDITION):
                await client.ack_stream(init.container, "init", STDOUT, size)
            async with await client.attach(init.container) as out:
                assert out.offset == 70_000
                with refused(Code.FAILED_PRECONDITION):
                    await client.attach(init.container)

    play(body)


async def pieces(stream: Stream) -> AsyncIterator[bytes]:
    while data := await stream.read(MIB):
        yield data
    stream.check_complete()


def test_lost_connections_cost_nothing(target: Target) -> None:
    """The client's own spool: cut in the middle again and again, it goes on at the byte."""
    size, chance = 24 * MIB, random.Random(3)

    async def body() -> None:
        command = pattern.command(f"write(1, 3, {size})")
        async with (
            await connect(target) as client,
            created(target, client, *command, stdio=Stdio(stdout=spool(SMALL))) as init,
            await client.events(container=init.container) as events,
        ):
            out = init.streams["stdout"]
            assert isinstance(out, SpoolStream)
            await init.start()
            waiting = asyncio.create_task(init.wait())
            total, cut_at, cuts = hashlib.sha256(), 1, 0
            while data := await out.read(chance.randrange(1, 200_000)):
                total.update(data)
                if out.position >= cut_at:
                    out._sock.shutdown(2)
                    cuts += 1
                    cut_at = out.position + chance.randrange(MIB)
            assert cuts > 20
            assert total.hexdigest() == pattern.digest(3, size)
            record = await waiting
            assert (record.exit_code, record.streams["stdout"]) == (0, size)
            assert (await event(events, "stream.end", init.container)).data["bytes"] == size
            state = (await client.process_state(init.container)).streams["stdout"]
            assert (state.bytes, state.first, state.ended) == (size, size, True)

    play(body)


def test_an_agent_killed_again_and_again_loses_no_byte_of_a_spool(own: RunningAgent, target: Target) -> None:
    """On the one connection there is from beginning to end, and on the client's that makes new ones."""
    size, kills, chance = 160 * MIB, 12, random.Random(4)

    async def kill(client: Client, reading: Stream, step: int) -> None:
        assert client.welcome is not None
        generation = client.welcome.generation
        for number in range(1, kills + 1):
            while reading.position < number * step:  # noqa: ASYNC110 - the reader is another task
                await asyncio.sleep(0.001)
            await asyncio.sleep(chance.random() * 0.02)
            os.kill(own.agent_pid, signal.SIGKILL)
            await asyncio.to_thread(own.wait_for_generation, generation + number)

    async def body() -> None:
        command = pattern.command(f"write_both({size})")
        stdio = Stdio(stdout=spool(1 << 20), stderr=spool(SMALL))
        async with (
            await connect(target) as client,
            running(target, client, *command, stdio=stdio, attached=False) as init,
            await client.attach(init.container) as held,
            await client.attach_spool(init.container, "init", StreamName.STDERR, acknowledge=True) as kept,
        ):
            held.finish_at(size)
            kept.finish_at(size)
            killing = asyncio.create_task(kill(client, held, size // (kills + 2)))
            found = await asyncio.gather(digest_of(held, client, init.container), digest_of(kept))
            await killing
            assert list(found) == [pattern.digest(1, size), pattern.digest(2, size)]
            record = await init.wait()
            assert record.streams == {"stdin": 0, "stdout": size, "stderr": size}
            assert held.offset == 0
            assert held.received == size  # one connection all the time

    play(body)


def test_an_agent_killed_while_nobody_reads_goes_on_filling(own: RunningAgent, target: Target) -> None:
    async def body() -> None:
        command = pattern.command(f"write(1, 6, {SMALL + 5})")
        async with (
            await connect(target) as client,
            created(target, client, *command, stdio=Stdio(stdout=spool(SMALL)), attached=False) as init,
        ):
            os.kill(own.agent_pid, signal.SIGKILL)
            await init.start()
            await state_when(client, init.container, lambda s: s.streams["stdout"].bytes == SMALL)
            os.kill(own.agent_pid, signal.SIGKILL)
            state = await client.process_state(init.container)
            assert (state.streams["stdout"].bytes, state.streams["stdout"].ended) == (SMALL, False)
            await client.ack_stream(init.container, "init", STDOUT, SMALL - 1)
            await state_when(client, init.container, lambda s: s.streams["stdout"].ended)
            os.kill(own.agent_pid, signal.SIGKILL)
            async with await client.attach(init.container) as out:
                assert out.offset == SMALL - 1
                out.finish_at(SMALL + 5)
                assert b"".join([data async for data in pieces(out)]) == pattern.take(6, SMALL - 1, SMALL + 5)

    play(body)


def test_auto_delete_waits_for_what_is_owed(target: Target) -> None:
    async def body() -> None:
        stdio = Stdio(stdout=spool(SMALL))
        async with (
            await connect(target) as client,
            await client.events() as events,
            running(target, client, "echo", "mine", stdio=stdio, attached=False, auto_delete=True) as init,
        ):
            await event(events, "stream.end", init.container)
            await event(events, "container.stopped", init.container)
            assert (await client.container_state(init.container)).status.value == "stopped"
            await client.ack_stream(init.container, "init", STDOUT, len("mine\n"))
            await event(events, "container.deleted", init.container)

    play(body)


# -- tee ---------------------------------------------------------------------------------------------


def test_a_tee_loses_nothing_though_the_agent_is_killed(target: Target, own: RunningAgent) -> None:
    """The client reads slowly and never attaches again: its connection outlives each agent."""
    size, kills = 24 * MIB, 12

    async def body() -> None:
        tee = StreamSpec(StreamMode.SPOOL, SMALL, tee=True)
        async with (
            await connect(target) as client,
            created(
                target, client, *pattern.command(f"write(1, 9, {size})"), stdio=Stdio(stdout=tee)
            ) as init,
        ):
            out = init.streams["stdout"]
            await init.start()
            total = hashlib.sha256()
            for number in range(1, kills + 1):
                while out.position < size * number // (kills + 1):
                    total.update(await Stream.read(out, 64 << 10))
                os.kill(own.agent_pid, signal.SIGKILL)
                before = (await client.ping()).generation
                assert before > number
            while out.position < size:
                total.update(await Stream.read(out))
            assert total.hexdigest() == pattern.digest(9, size)
            assert (await init.wait()).streams["stdout"] == size

    play(body)


# -- drop_oldest ------------------------------------------------------------------------------------


def test_a_log_keeps_the_newest_bytes_and_says_what_is_gone(target: Target, own: RunningAgent) -> None:
    size, limit = 5 * MIB + 7, 1 << 20

    async def body() -> None:
        command = pattern.command(f"write(1, 8, {size})")
        async with (
            await connect(target) as client,
            running(target, client, *command, stdio=Stdio(stdout=log(limit)), attached=False) as init,
        ):
            state = await state_when(client, init.container, lambda s: s.streams["stdout"].ended)
            kept = state.streams["stdout"]
            assert (kept.bytes, kept.first, kept.when_full) == (size, size - limit, WhenFull.DROP_OLDEST)
            assert (await init.wait()).exit_code == 0  # nobody read a byte, and nobody had to
            with pytest.raises(RpcError) as gone:
                await client.attach(init.container, offset=5)
            assert gone.value.code is Code.FAILED_PRECONDITION
            assert gone.value.details["dropped"] == size - limit - 5
            wanted = pattern.take(8, size - limit, size)
            readers = [await client.attach(init.container) for _ in range(3)]
            for reader in readers:
                assert reader.offset == size - limit
                reader.finish_at(size)
                assert b"".join([data async for data in pieces(reader)]) == wanted
                reader.close()
            async with await client.attach_spool(
                init.container, "init", STDOUT, offset=5, acknowledge=False
            ) as late:
                late.finish_at(size)
                assert b"".join([data async for data in pieces(late)]) == wanted
                assert late.dropped == size - limit - 5
            assert limit <= held_bytes(own) <= limit + (256 << 10)

    play(body)


def held_bytes(agent: RunningAgent) -> int:
    """What nameless files of the agent's supervisor take up."""
    sizes = {}
    for fd in Path(f"/proc/{agent.pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if "(deleted)" in os.readlink(fd) and "memfd" not in os.readlink(fd):
                found = os.stat(fd)
                sizes[found.st_ino] = found.st_blocks * 512
    return sum(sizes.values())


def test_a_reader_that_falls_behind_learns_how_much_it_missed(target: Target) -> None:
    size = 12 * MIB

    async def body() -> None:
        command = pattern.command(f"write(1, 9, {size})")
        async with (
            await connect(target) as client,
            created(target, client, *command, stdio=Stdio(stdout=log(1 << 20)), attached=False) as init,
            await client.attach_spool(init.container, "init", STDOUT, acknowledge=False) as out,
        ):
            await init.start()
            await state_when(client, init.container, lambda s: s.streams["stdout"].ended)
            out.finish_at(size)
            start = seen = missed = 0
            while data := await out.read(MIB):
                if out.dropped > missed:  # these bytes come behind the gap
                    start += out.dropped - missed
                    missed = out.dropped
                assert data == pattern.take(9, start, start + len(data))
                start += len(data)
                seen += len(data)
            assert (seen + missed, out.position) == (size, size)
            assert missed > 0

    play(body)


def test_find_gives_lines_and_times(target: Target) -> None:
    script = "printf 'early %s\\n' 1 2 3; read line; printf 'late %s\\n' 1 2; printf end"

    async def body() -> None:
        stdio = Stdio(stdin=StreamSpec(StreamMode.STREAM), stdout=log())
        async with (
            await connect(target) as client,
            running(target, client, "sh", "-c", script, stdio=stdio, attached=False) as init,
        ):
            early = len("early 1\n") * 3
            await state_when(client, init.container, lambda s: s.streams["stdout"].bytes == early)
            moment = time.time_ns()
            async with await client.attach(init.container, stream=StreamName.STDIN) as stdin:
                await stdin.write(b"go\n")
                await state_when(client, init.container, lambda s: s.streams["stdout"].ended)

            async def find(**how: Any) -> int:
                found = await client.find_in_stream(init.container, "init", STDOUT, **how)
                assert (found.first, found.end) == (0, early + len("late 1\nlate 2\nend"))
                return found.offset

            end = early + len("late 1\nlate 2\nend")
            assert await find() == 0
            assert await find(since_ns=0) == 0
            assert await find(since_ns=moment) == early
            assert await find(since_ns=time.time_ns()) == end
            assert [await find(tail=lines) for lines in (0, 1, 2, 3, 4, 6, 7)] == [
                end, end - 3, end - 10, early, early - 8, 0, 0
            ]  # fmt: skip
            assert await find(since_ns=moment, tail=1) == end - 3
            assert await find(since_ns=moment, tail=100) == early

    play(body)


def test_gcsctl_logs_follows_across_agents(own: RunningAgent, target: Target) -> None:
    """Nobody tells it that the agent was killed, and it has no need to know."""
    size, kills = 8 * MIB, 4

    async def body() -> None:
        command = pattern.command(f"write(1, 11, {size // 2}); input(); write(1, 12, {size // 2})")
        stdio = Stdio(stdin=StreamSpec(StreamMode.STREAM), stdout=log(16 * MIB))
        async with (
            await connect(target) as client,
            running(target, client, *command, stdio=stdio, attached=False) as init,
        ):
            following = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "gcsagent.host", "--address", target.address),
                *("logs", "-f", init.container),
                cwd=REPO,
                stdout=asyncio.subprocess.PIPE,
                limit=MIB,
            )
            assert following.stdout is not None
            found = b""
            for part in range(kills):
                found += await following.stdout.readexactly(size // 2 // kills * (part + 1) - len(found))
                generation = (await client.ping()).generation
                os.kill(own.agent_pid, signal.SIGKILL)
                await asyncio.to_thread(own.wait_for_generation, generation + 1)
            async with await client.attach(init.container, stream=StreamName.STDIN) as stdin:
                await stdin.write(b"go\n")
            found += await asyncio.wait_for(following.stdout.read(), 30)
            assert await following.wait() == 0
            assert found == pattern.take(11, 0, size // 2) + pattern.take(12, 0, size // 2)

    play(body)


# -- everything else --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stdio",
    [
        Stdio(stdin=StreamSpec(StreamMode.SPOOL)),
        Stdio(tty=StreamSpec(StreamMode.SPOOL), terminal=True),
    ],
    ids=["stdin", "tty"],
)
def test_only_outputs_are_spooled(target: Target, stdio: Stdio) -> None:
    async def body() -> None:
        async with await connect(target) as client:
            with refused(Code.UNIMPLEMENTED):
                async with created(target, client, "true", stdio=stdio, attached=False):
                    pass
            assert await client.list_containers() == ()

    play(body)


def test_deletion_in_the_middle_leaves_nothing(own: RunningAgent, target: Target) -> None:
    async def body() -> None:
        before = own.holdings()
        stdio = Stdio(stdout=spool(SMALL), stderr=log())
        async with await connect(target) as client:
            command = pattern.command(f"write_both({4 * MIB})")
            params = creation(target, name("c"), tuple(command), stdio=stdio)
            init = await RemoteProcess.create(client, params)
            async with init:
                await init.start()
                assert await init.streams["stdout"].read()
                await remove(client, init.container)
                out = init.streams["stdout"]
                while await out.read():
                    pass
        await asyncio.to_thread(own.assert_holds, before)

    play(body)
