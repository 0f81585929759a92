"""Cases about hosts that go away in the middle, and come back."""

from __future__ import annotations

import asyncio

from gcsagent.host.process import RemoteProcess
from gcsagent.host.streams import Stream
from protocol.errors import Code
from protocol.families.stream import StreamName
from protocol.types import Reason, Status, Stdio, StreamMode, StreamSpec, WhenFull
from tests.cases import pattern
from tests.cases.target import (
    MIB,
    PIPES,
    STREAM,
    Target,
    case,
    connect,
    creation,
    event,
    expect,
    name,
    refused,
    remove,
    running,
)


@case
async def a_host_that_comes_back_finds_everything(target: Target) -> None:
    """Process, exit record, every event since, and the pipe nobody has read."""
    size = 50_000
    command = pattern.command(f"write(2, 8, 3)\nsys.stdin.read()\nwrite(1, 9, {size})\nsys.exit(17)")
    params = creation(target, name("c"), tuple(command), stdio=PIPES)
    async with await connect(target) as back:
        try:
            client = await connect(target)
            events = await client.events()
            await client.create_container(params)
            seen = await event(events, "container.created", params.container)
            stdin = await client.attach(params.container, stream=StreamName.STDIN)
            stderr = await client.attach(params.container, stream=StreamName.STDERR)
            await client.start_container(params.container)
            assert len(await expect(stderr, b"(?s)...")) == 3
            waiting = asyncio.ensure_future(client.wait_container(params.container))
            await client.ping()
            for connection in (stdin, stderr):
                connection.close()
            await events.aclose()
            await client.aclose()  # everything of this host is gone, a wait of it included
            await asyncio.gather(waiting, return_exceptions=True)

            state = await back.container_state(params.container)
            assert state.status is Status.RUNNING
            await back.close_stdin(params.container, "init", 0)
            record = await back.wait_container(params.container)
            assert (record.exit_code, record.reason) == (17, Reason.EXITED)
            assert record.streams == {"stdin": 0, "stdout": size, "stderr": 3}

            async with await back.events(after=seen.seq) as replay:
                kinds, numbers = [], []
                async for each in replay:
                    numbers.append(each.seq)
                    kinds += [each.type] if each.container == params.container else []
                    if each.type == "container.stopped" and each.container == params.container:
                        break
                assert replay.dropped == 0
            assert numbers == list(range(seen.seq + 1, seen.seq + 1 + len(numbers)))
            wanted = ["process.started", "container.started", "process.exited", "container.stopped"]
            assert [kind for kind in kinds if kind != "stream.end"] == wanted

            async with await back.attach(params.container) as out:
                assert out.offset == 0
                assert await read_to(out, size) == pattern.take(9, 0, size)
        finally:
            await remove(back, params.container)


@case
async def a_reader_that_left_goes_on_at_the_offset_it_is_told(target: Target) -> None:
    """What was under way on the lost connection is lost, and known; nothing else is, nothing comes twice."""
    size = 4 * MIB
    command = pattern.command(f"write(1, 10, {size})")
    async with (
        await connect(target) as back,
        running(target, back, *command, stdio=PIPES, attached=False) as init,
    ):
        before = 0
        for _ in range(5):
            # The guest may not have seen yet that the last connection is gone: hence take.
            out = await back.attach(init.container, take=True)
            assert out.offset >= before
            piece = await out.read()
            assert piece == pattern.take(10, out.offset, out.position)
            before = out.position
            out.close()
        async with await back.attach(init.container, take=True) as out:
            assert out.offset >= before
            start = out.offset
            assert await read_to(out, size) == pattern.take(10, start, size)
        assert (await init.wait()).streams["stdout"] == size


@case
async def a_host_takes_every_stream_from_one_that_hangs(target: Target) -> None:
    """Of an output in mode `spool` it has what its predecessor was given and has not dealt with."""
    stdio = Stdio(STREAM, StreamSpec(StreamMode.SPOOL, when_full=WhenFull.BLOCK), STREAM)
    command = ("sh", "-c", "echo first; read x; echo $x; echo error >&2; exit 5")
    async with await connect(target) as client, running(target, client, *command, stdio=stdio) as hanging:
        assert await expect(hanging.streams["stdout"], rb"first\n") == b"first\n"
        async with await connect(target) as back:
            with refused(Code.FAILED_PRECONDITION):
                await RemoteProcess.attach(back, hanging.container)
            async with await RemoteProcess.attach(back, hanging.container, take=True) as taken:
                done = await taken.communicate(b"second\n")
            assert (done.stdout, done.stderr) == (b"first\nsecond\n", b"error\n")
            assert done.exit.exit_code == 5


@case
async def a_create_goes_on_without_its_host(target: Target) -> None:
    async with await connect(target) as back, await back.events() as events:
        client, params = await connect(target), creation(target, name("c"), ("true",))
        asking = asyncio.ensure_future(client.create_container(params, request_id=params.container))
        try:
            await client.ping()  # the create is in front of it
            await client.aclose()
            await asyncio.gather(asking, return_exceptions=True)
            created = await event(events, "container.created", params.container)
            again = await back.create_container(params, request_id=params.container)
            assert again.pid == created.data["pid"]
        finally:
            await remove(back, params.container)


@case
async def two_hosts_see_the_same(target: Target) -> None:
    async with await connect(target) as one, await connect(target) as two, await two.events() as events:
        async with running(target, one) as init:
            await event(events, "container.started", init.container)
            assert await one.container_state(init.container) == await two.container_state(init.container)
            await two.kill_container(init.container, "KILL")
            assert (await one.wait_container(init.container)).signal == 9
        await event(events, "container.deleted", init.container)


async def read_to(stream: Stream, end: int) -> bytes:
    """From where the stream is to ``end``."""
    stream.finish_at(end)
    found = bytearray()
    while data := await stream.read(MIB):
        found += data
    stream.check_complete()
    return bytes(found)
