"""Cases about bytes: exactness, back-pressure, ends."""

from __future__ import annotations

import asyncio
import hashlib
import sys

from gcsagent.host.spec import exec_spec
from gcsagent.host.streams import Stream
from protocol.errors import Code
from protocol.families.process import Exec
from protocol.families.stream import StreamName
from protocol.types import Stdio
from tests.cases import pattern
from tests.cases.agents import REPO
from tests.cases.target import (
    MIB,
    OUTPUT,
    PIPES,
    STREAM,
    Target,
    case,
    connect,
    executing,
    expect,
    name,
    refused,
    run,
    running,
)


async def digest_of(stream: Stream) -> tuple[int, str]:
    """Size and SHA-256 of all that comes."""
    total, size = hashlib.sha256(), 0
    while data := await stream.read(MIB):
        total.update(data)
        size += len(data)
    stream.check_complete()
    return size, total.hexdigest()


@case
async def output_is_exact_to_the_byte(target: Target) -> None:
    async with await connect(target) as client:
        done = await run(client, target.box, "sh", "-c", "echo -n 'no newline'; echo -n >&2 err")
        assert (done.stdout, done.stderr, done.exit.exit_code) == (b"no newline", b"err", 0)
        assert done.exit.streams == {"stdin": 0, "stdout": 10, "stderr": 3}


@case
async def init_output_is_exact_from_the_first_byte(target: Target) -> None:
    async with (
        await connect(target) as client,
        running(target, client, "echo", "-n", "x", stdio=OUTPUT) as init,
    ):
        done = await init.communicate()
        assert (done.stdout, done.stderr, done.exit.exit_code) == (b"x", b"", 0)


@case
async def sixty_four_mib_on_stdout_and_stderr_at_once(target: Target) -> None:
    size = 64 * MIB
    async with await connect(target) as client:
        command = pattern.command(f"write_both({size})")
        async with executing(client, target.box, *command) as process, asyncio.TaskGroup() as tasks:
            out, err = (tasks.create_task(digest_of(process.streams[name])) for name in ("stdout", "stderr"))
            record = await process.wait()
        assert out.result() == (size, pattern.digest(1, size))
        assert err.result() == (size, pattern.digest(2, size))
        assert (record.exit_code, record.streams["stdout"], record.streams["stderr"]) == (0, size, size)


@case
async def twenty_mib_of_stdin_come_back_checksummed(target: Target) -> None:
    size = 20 * MIB
    async with await connect(target) as client:
        done = await run(client, target.box, "sha256sum", data=pattern.take(3, 0, size), stdio=PIPES)
        assert done.stdout.split()[0].decode() == pattern.digest(3, size)
        assert (done.exit.exit_code, done.exit.streams["stdin"]) == (0, size)


@case
async def a_mebibyte_through_cat_comes_back_as_it_went(target: Target) -> None:
    """Both directions at once, far beyond what the pipes hold: neither may wait for the other's end."""
    data = pattern.take(4, 0, MIB + 1)
    async with await connect(target) as client:
        done = await run(client, target.box, "cat", data=data, stdio=PIPES)
        assert (done.stdout == data, done.exit.exit_code) == (True, 0)


@case
async def the_end_of_stdin_ends_cat(target: Target) -> None:
    async with await connect(target) as client, executing(client, target.box, "cat", stdio=PIPES) as cat:
        stdin, stdout = cat.streams["stdin"], cat.streams["stdout"]
        await stdin.write(b"one ")
        assert await expect(stdout, b"one ") == b"one "
        await stdin.write(b"two")
        await cat.end_input()
        assert await expect(stdout, b"two") == b"two"
        assert (await cat.wait()).exit_code == 0


@case
async def a_reader_that_stops_stalls_only_its_own_stream(target: Target) -> None:
    """Stdout is not read until stderr, and the whole output of somebody else, have come through."""
    size = 8 * MIB
    async with await connect(target) as client:
        command = pattern.command(f"write_both({size})")
        async with executing(client, target.box, *command) as process:
            err = bytearray()
            while len(err) < size:
                data = await process.streams["stderr"].read(MIB)
                assert data
                err += data
            assert hashlib.sha256(err).hexdigest() == pattern.digest(2, size)
            other = await run(client, target.box, *pattern.command(f"write(1, 5, {MIB})"))
            assert hashlib.sha256(other.stdout).hexdigest() == pattern.digest(5, MIB)
            state = await client.process_state(target.box, process.process)
            assert state.exit is None
            assert state.streams["stdout"].bytes < size
            async with asyncio.TaskGroup() as tasks:
                out = tasks.create_task(digest_of(process.streams["stdout"]))
                await process.wait()
            assert out.result() == (size, pattern.digest(1, size))


@case
async def a_burst_and_an_immediate_exit_lose_nothing(target: Target) -> None:
    size = 8 * MIB
    async with (
        await connect(target) as client,
        running(target, client, *pattern.command(f"write(1, 6, {size})\nos._exit(9)"), stdio=OUTPUT) as init,
    ):
        done = await init.communicate()
        assert (len(done.stdout), done.exit.exit_code) == (size, 9)
        assert hashlib.sha256(done.stdout).hexdigest() == pattern.digest(6, size)


@case
async def output_waits_in_the_pipe_for_whoever_attaches_after_the_exit(target: Target) -> None:
    async with (
        await connect(target) as client,
        executing(
            client, target.box, "sh", "-c", "head -c 60000 /dev/zero; exit 3", attached=False
        ) as process,
    ):
        assert (await client.wait_process(target.box, process.process)).streams["stdout"] == 60000
        async with await client.attach(target.box, process.process, StreamName.STDOUT) as late:
            assert late.offset == 0
            late.finish_at(60000)
            assert await digest_of(late) == (60000, hashlib.sha256(bytes(60000)).hexdigest())


@case
async def a_grandchild_that_keeps_stdout_open_delays_nobody(target: Target) -> None:
    """Neither wait, nor the reader, nor gcsctl: the exit record says how much the process itself wrote."""
    leaving = ("sh", "-c", "sleep 100000 & echo parent; exit 5")
    async with (
        await connect(target) as client,
        running(target, client) as init,
        asyncio.timeout(8 * target.pace),
    ):
        done = await run(client, init.container, *leaving)
        assert (done.stdout, done.exit.exit_code) == (b"parent\n", 5)
        gcsctl = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "gcsagent.host", "--address", target.address),
            *("exec", init.container, "--", *leaving),
            cwd=REPO,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        assert (*await gcsctl.communicate(), gcsctl.returncode) == (b"parent\n", b"", 5)


@case
async def null_streams_are_dev_null(target: Target) -> None:
    async with (
        await connect(target) as client,
        executing(
            client, target.box, "sh", "-c", "cat; echo lost; echo lost >&2; exit 4", stdio=Stdio()
        ) as process,
    ):
        assert (await process.wait()).exit_code == 4
        for name in (StreamName.STDIN, StreamName.STDOUT, StreamName.STDERR):
            with refused(Code.FAILED_PRECONDITION):
                await client.attach(target.box, process.process, name)
        with refused(Code.NOT_FOUND):
            await client.attach(target.box, process.process, StreamName.TTY)


@case
async def a_second_attach_is_refused_unless_it_takes(target: Target) -> None:
    async with await connect(target) as client, executing(client, target.box, "cat", stdio=PIPES) as cat:
        first = cat.streams["stdout"]
        await cat.streams["stdin"].write(b"for the first")
        await expect(first, b"for the first")
        with refused(Code.FAILED_PRECONDITION):
            await client.attach(target.box, cat.process, StreamName.STDOUT)
        async with await client.attach(target.box, cat.process, StreamName.STDOUT, take=True) as second:
            assert second.offset == len(b"for the first")
            assert await first.read() == b""
            await cat.streams["stdin"].write(b"for the second")
            await expect(second, b"for the second")


@case
async def an_attach_may_go_ahead_of_the_answer_to_its_exec(target: Target) -> None:
    """It is for the process of that request only, and answered once it runs: from its first byte on."""
    spec = exec_spec(args=("sh", "-c", "echo first; echo there >&2; read line; exit 3"))
    params = Exec(target.box, name("p"), spec, PIPES)
    where = params.container, params.process
    async with await connect(target) as client:
        launching = asyncio.ensure_future(client.exec_process(params, request_id=params.process))
        stdin, stdout, stderr = await asyncio.gather(
            *(
                client.attach(*where, each, exec_request=params.process, launching=launching)
                for each in (StreamName.STDIN, StreamName.STDOUT, StreamName.STDERR)
            )
        )
        await launching
        try:
            assert (stdout.offset, await expect(stdout, b"first\n")) == (0, b"first\n")
            await expect(stderr, b"there\n")
            with refused(Code.NOT_FOUND):
                await client.attach(*where, StreamName.STDOUT, take=True, exec_request="of another")
            await stdin.write(b"\n")
            assert (await client.wait_process(*where)).exit_code == 3
        finally:
            for stream in (stdin, stdout, stderr):
                stream.close()
            await client.delete_process(*where)


@case
async def stdin_once_ends_with_its_client(target: Target) -> None:
    once = Stdio(STREAM, STREAM, stdin_once=True)
    async with await connect(target) as client, executing(client, target.box, "cat", stdio=once) as cat:
        await cat.streams["stdin"].write(b"bye")
        await expect(cat.streams["stdout"], b"bye")
        cat.streams["stdin"].close()
        assert (await cat.wait()).exit_code == 0


@case
async def stdin_stays_open_for_the_next_client_otherwise(target: Target) -> None:
    async with await connect(target) as client, executing(client, target.box, "cat", stdio=PIPES) as cat:
        stdout = cat.streams["stdout"]
        await cat.streams["stdin"].write(b"first ")
        await expect(stdout, b"first ")
        cat.streams["stdin"].close()
        async with await client.attach(target.box, cat.process, StreamName.STDIN) as again:
            assert again.offset == len(b"first ")
            await again.write(b"second")
            await expect(stdout, b"second")
            await client.close_stdin(target.box, cat.process, again.input_position)
            assert (await cat.wait()).exit_code == 0
