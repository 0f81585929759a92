"""Streams and processes: counting, where output ends, back-pressure, and what each side's closing means."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from gcsagent.host.bridge import LocalStdio, bridge
from gcsagent.host.client import Client
from gcsagent.host.errors import ClosedByPeer, ClosedByUs, ConnectionBroken, OutputTooLarge, OutputTruncated
from gcsagent.host.localio import LocalReader
from gcsagent.host.process import Completed, RemoteProcess
from gcsagent.host.streams import Stream
from protocol.errors import Code, RpcError
from protocol.families.container import CreateContainer
from protocol.families.process import Exec
from protocol.families.stream import StreamName
from protocol.method import Empty
from protocol.types import Event, Reason, Stdio, StreamMode, StreamSpec
from tests.fakes.fake_agent import FakeAgent, Script, exit_record, with_client

ON = StreamSpec(StreamMode.STREAM)
PIPES = Stdio(ON, ON, ON)
TERMINAL = Stdio(tty=ON, terminal=True)


def with_pair(body: Callable[[Stream, socket.socket], Awaitable[None]], offset: int = 0) -> None:
    async def scenario() -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        with theirs:
            stream = Stream("stdout", ours, offset)
            try:
                await body(stream, theirs)
            finally:
                stream.close()

    asyncio.run(scenario())


async def communicated(client: Client, stdio: Stdio, data: bytes | None = None) -> Completed:
    async with await RemoteProcess.create(client, CreateContainer("c", spec={}, stdio=stdio)) as process:
        await process.start()
        return await process.communicate(data)


async def everything(stream: Stream) -> bytes:
    data = b""
    while chunk := await stream.read():
        data += chunk
    return data


# -- counting -------------------------------------------------------------------------------------


def test_output_ends_where_it_was_said_to_though_the_pipe_stays_open() -> None:
    async def body(stream: Stream, guest: socket.socket) -> None:
        reading = asyncio.create_task(everything(stream))
        guest.send(b"hello")
        await asyncio.sleep(0.01)
        assert not reading.done()
        stream.finish_at(15)
        guest.send(b" worldmore than was said")
        assert await reading == b"hello worldmore"[:15]
        stream.check_complete()
        assert stream.position == 15

    with_pair(body)


def test_the_end_may_be_said_after_everything_has_come() -> None:
    async def body(stream: Stream, guest: socket.socket) -> None:
        reading = asyncio.create_task(everything(stream))
        guest.send(b"abc")
        await asyncio.sleep(0.01)
        stream.finish_at(3)
        assert await reading == b"abc"

    with_pair(body)


def test_an_earlier_connections_bytes_count() -> None:
    async def body(stream: Stream, guest: socket.socket) -> None:
        stream.finish_at(103)
        guest.send(b"abc")
        assert await everything(stream) == b"abc"
        stream.check_complete()

    with_pair(body, offset=100)


@pytest.mark.parametrize("total", [0, -1, -(1 << 63)])
def test_no_output_at_all(total: int) -> None:
    async def body(stream: Stream, guest: socket.socket) -> None:
        stream.finish_at(total)
        assert await everything(stream) == b""
        stream.check_complete()

    with_pair(body)


def test_a_connection_that_ends_early_is_truncation() -> None:
    async def body(stream: Stream, guest: socket.socket) -> None:
        guest.send(b"abc")
        guest.shutdown(socket.SHUT_WR)
        assert await everything(stream) == b"abc"
        stream.check_complete()  # nobody has said yet that there was more
        stream.finish_at(5)
        with pytest.raises(OutputTruncated, match="after 3 of 5 bytes"):
            stream.check_complete()

    with_pair(body)


def test_bytes_behind_the_attach_reply_are_the_streams_first() -> None:
    async def scenario() -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs, ours:
            stream = Stream("stdout", ours, 0, b"abcdef")
            assert await stream.read(4) == b"abcd"
            stream.finish_at(5)
            assert await stream.read() == b"e"
            assert await stream.read() == b""

    asyncio.run(scenario())


def test_closing_wakes_the_reader() -> None:
    async def body(stream: Stream, guest: socket.socket) -> None:
        reading = asyncio.create_task(stream.read())
        await asyncio.sleep(0.01)
        stream.close()
        with pytest.raises(ClosedByUs):
            await reading

    with_pair(body)


def test_a_reset_is_a_broken_connection() -> None:
    async def body(stream: Stream, guest: socket.socket) -> None:
        await stream.write(b"unread")
        guest.close()
        with pytest.raises(ConnectionBroken):
            await stream.read()

    with_pair(body)


def test_writing_waits_for_the_process_and_counts() -> None:
    async def body(stream: Stream, guest: socket.socket) -> None:
        data = os.urandom(4 << 20)
        writing = asyncio.create_task(stream.write(data))
        await asyncio.sleep(0.05)
        assert not writing.done()
        got = b""
        while len(got) < len(data):
            got += await asyncio.get_running_loop().sock_recv(guest, 1 << 20)
        await writing
        assert got == data
        assert stream.input_position == 100 + len(data)

    with_pair(body, offset=100)


def test_writing_to_a_process_that_reads_no_more() -> None:
    async def body(stream: Stream, guest: socket.socket) -> None:
        guest.close()
        with pytest.raises(ClosedByPeer):
            await stream.write(b"x")

    with_pair(body)


def test_a_closed_writer_wakes() -> None:
    async def body(stream: Stream, guest: socket.socket) -> None:
        writing = asyncio.create_task(stream.write(bytes(8 << 20)))
        await asyncio.sleep(0.05)
        stream.close()
        with pytest.raises(ClosedByUs):
            await writing

    with_pair(body)


# -- attach ---------------------------------------------------------------------------------------


def test_attach_has_a_connection_of_its_own_and_closing_only_detaches(tmp_path: Path) -> None:
    async def body(agent: FakeAgent, client: Client) -> None:
        Script(stdout=b"hi").install(agent)
        agent.offsets["stdout"] = 40
        await client.start_container("c")
        stream = await client.attach("c")
        assert stream.offset == 40
        assert await stream.read() == b"hi"
        assert stream.position == 42
        stream.close()
        assert [name for name, _ in agent.calls].count("agent.hello") == 2
        assert agent.named("process.kill") == []
        assert agent.named("process.close_stdin") == []

    with_client(tmp_path, body)


def test_a_refused_attach_is_the_agents_error(tmp_path: Path) -> None:
    async def body(agent: FakeAgent, client: Client) -> None:
        with pytest.raises(RpcError) as caught:
            await client.attach("c", stream=StreamName.STDERR)
        assert caught.value.code is Code.FAILED_PRECONDITION

    with_client(tmp_path, body)


# -- processes ------------------------------------------------------------------------------------


def test_output_input_and_exit_of_a_container(tmp_path: Path) -> None:
    async def body(agent: FakeAgent, client: Client) -> None:
        data = os.urandom(3 << 20)
        script = Script(stdout=b"out:", stderr=b"err", code=7, echo=True)
        script.install(agent)
        done = await communicated(client, PIPES, data)
        assert done.stdout == b"out:" + data
        assert done.stderr == b"err"
        assert done.exit.exit_code == 7
        assert script.stdin_end == len(data)
        order = [name for name, _ in agent.calls if name not in ("agent.hello", "process.close_stdin")]
        assert order[0] == "container.create"
        assert sorted(order[1:4]) == ["stream.attach"] * 3
        assert order[4:] == ["container.start", "process.wait"]

    with_client(tmp_path, body)


def test_an_exec_is_attached_to_after_it_runs(tmp_path: Path) -> None:
    async def body(agent: FakeAgent, client: Client) -> None:
        Script(stdout=b"x" * 100_000).install(agent)
        params = Exec("c", "p1", {"args": ["true"]}, Stdio(stdout=ON))
        async with await RemoteProcess.exec(client, params) as process:
            done = await process.communicate()
        assert done.stdout == b"x" * 100_000
        assert [attach["process"] for attach in agent.named("stream.attach")] == ["p1"]

    with_client(tmp_path, body)


def test_a_container_that_cannot_be_attached_to_is_removed_again(tmp_path: Path) -> None:
    async def body(agent: FakeAgent, client: Client) -> None:
        Script().install(agent)
        del agent.streams["stderr"]
        with pytest.raises(RpcError, match="stderr is null"):
            await RemoteProcess.create(client, CreateContainer("c", spec={}, stdio=PIPES))
        assert agent.named("container.delete") == [{"container": "c", "force": True}]

    with_client(tmp_path, body)


def test_a_refused_create_deletes_nothing(tmp_path: Path) -> None:
    async def body(agent: FakeAgent, client: Client) -> None:
        Script().install(agent)

        def exists(params: Any) -> Any:
            raise RpcError(Code.ALREADY_EXISTS, "container 'c' exists")

        agent.handlers["container.create"] = exists
        with pytest.raises(RpcError, match="exists"):
            await RemoteProcess.create(client, CreateContainer("c", spec={}, stdio=PIPES))
        assert agent.named("container.delete") == []

    with_client(tmp_path, body)


@pytest.mark.parametrize("exists", [False, True])
def test_a_cancelled_create_removes_only_what_it_made(tmp_path: Path, exists: bool) -> None:
    async def body(agent: FakeAgent, client: Client) -> None:
        Script().install(agent)
        begun, go_on = asyncio.Event(), asyncio.Event()

        async def create(params: Any) -> Any:
            begun.set()
            await go_on.wait()
            if exists:
                raise RpcError(Code.ALREADY_EXISTS, "it is somebody else's")
            return {"pid": 1}

        agent.handlers["container.create"] = create
        creating = asyncio.create_task(
            RemoteProcess.create(client, CreateContainer("c", spec={}, stdio=PIPES))
        )
        await begun.wait()
        creating.cancel()
        await asyncio.sleep(0.01)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await creating
        assert len(agent.named("container.delete")) == (0 if exists else 1)

    with_client(tmp_path, body)


def test_too_much_output_is_an_error_not_memory(tmp_path: Path) -> None:
    async def body(agent: FakeAgent, client: Client) -> None:
        Script(stdout=bytes(1 << 20)).install(agent)
        async with await RemoteProcess.create(client, CreateContainer("c", spec={}, stdio=PIPES)) as process:
            await process.start()
            with pytest.raises(OutputTooLarge):
                await process.communicate(limit=1000)

    with_client(tmp_path, body)


def terminal_agent(agent: FakeAgent, output: bytes, *, state: dict[str, Any], hang_up: bool = False) -> None:
    async def tty(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(output)
        if hang_up:
            writer.write_eof()
        await reader.read()

    agent.handlers |= {
        "container.create": lambda params: {"pid": 1},
        "container.start": lambda params: {"pid": 1},
        "process.wait": lambda params: exit_record(0, tty=2),
        "events.subscribe": lambda params: {"last": 5, "dropped": 0},
        "process.state": lambda params: {
            "container": "c",
            "process": "init",
            "status": "stopped",
            "pid": 1,
            "streams": {"tty": state},
        },
    }
    agent.streams["tty"] = tty


def test_a_terminal_ends_with_its_event(tmp_path: Path) -> None:
    async def body(agent: FakeAgent, client: Client) -> None:
        terminal_agent(agent, b"first last", state={"mode": "stream", "bytes": 2})
        state = agent.handlers["process.state"]

        def state_then_event(params: Any) -> Any:
            loop = asyncio.get_running_loop()
            for stream, total in (("stdout", 1), ("tty", 10)):
                event = Event(
                    6 + total, "stream.end", 0, "c", "init", data={"stream": stream, "bytes": total}
                )
                loop.call_later(0.05, agent.publish, event)
            return state(params)

        agent.handlers["process.state"] = state_then_event
        assert (await communicated(client, TERMINAL)).stdout == b"first last"

    with_client(tmp_path, body)


def test_a_terminal_that_has_ended_already(tmp_path: Path) -> None:
    async def body(agent: FakeAgent, client: Client) -> None:
        terminal_agent(agent, b"first last", state={"mode": "stream", "bytes": 10, "ended": True})
        assert (await communicated(client, TERMINAL)).stdout == b"first last"

    with_client(tmp_path, body)


def test_a_terminal_whose_connection_the_guest_closes(tmp_path: Path) -> None:
    async def body(agent: FakeAgent, client: Client) -> None:
        terminal_agent(agent, b"bye", state={"mode": "stream", "bytes": 0}, hang_up=True)
        assert (await communicated(client, TERMINAL)).stdout == b"bye"

    with_client(tmp_path, body)


def test_a_lost_exit_record_does_not_hang_the_output(tmp_path: Path) -> None:
    async def body(agent: FakeAgent, client: Client) -> None:
        script = Script(stdout=b"all of it")
        script.install(agent)
        lost = exit_record(255)
        agent.handlers["process.wait"] = lambda params: type(lost)(255, 0, Reason.LOST, 1, 0, 0)
        agent.handlers["events.subscribe"] = lambda params: {"last": 0, "dropped": 0}
        agent.handlers["process.state"] = lambda params: {
            "container": "c",
            "process": "init",
            "status": "stopped",
            "pid": 1,
            "streams": {"stdout": {"mode": "stream", "bytes": 9, "ended": True}},
        }
        done = await communicated(client, Stdio(stdout=ON))
        assert (done.stdout, done.exit.reason) == (b"all of it", Reason.LOST)

    with_client(tmp_path, body)


# -- local descriptors ----------------------------------------------------------------------------


async def bridged(
    agent: FakeAgent, client: Client, script: Script, *, stdin: int | None = None, stdout: int
) -> tuple[int, RemoteProcess]:
    script.install(agent)
    stdio = Stdio(ON if stdin is not None else StreamSpec(), ON, StreamSpec())
    async with await RemoteProcess.create(client, CreateContainer("c", spec={}, stdio=stdio)) as process:
        await process.start()
        record = await bridge(process, LocalStdio(stdin, stdout, stdout))
        return record.exit_code, process


def test_a_file_piped_through_comes_back(tmp_path: Path) -> None:
    data = os.urandom(5 << 20)
    (tmp_path / "in").write_bytes(data)

    async def body(agent: FakeAgent, client: Client) -> None:
        with (tmp_path / "in").open("rb") as given, (tmp_path / "out").open("wb") as got:
            code, _ = await bridged(
                agent, client, Script(echo=True, code=3), stdin=given.fileno(), stdout=got.fileno()
            )
        assert code == 3
        assert (tmp_path / "out").read_bytes() == data

    with_client(tmp_path, body)


def test_a_stalled_local_reader_stalls_neither_the_loop_nor_the_bytes(tmp_path: Path) -> None:
    data = os.urandom(3 << 20)

    async def body(agent: FakeAgent, client: Client) -> None:
        agent.handlers["agent.ping"] = lambda params: {"generation": 1, "uptime_ms": 1, "loop_lag_us": 1}
        read_end, write_end = os.pipe()
        try:
            running = asyncio.create_task(bridged(agent, client, Script(stdout=data), stdout=write_end))
            await asyncio.sleep(0.1)
            async with asyncio.timeout(1):
                await client.ping()
            assert not running.done()
            got = b""
            while len(got) < len(data):
                got += await asyncio.to_thread(os.read, read_end, 1 << 20)
            assert (await running)[0] == 0
            assert got == data
        finally:
            os.close(read_end)
            os.close(write_end)

    with_client(tmp_path, body)


def test_the_shells_descriptor_stays_blocking(tmp_path: Path) -> None:
    async def body(agent: FakeAgent, client: Client) -> None:
        read_end, write_end = os.pipe()
        try:
            await bridged(agent, client, Script(stdout=b"x"), stdout=write_end)
            assert os.get_blocking(write_end)
            assert os.read(read_end, 10) == b"x"
        finally:
            os.close(read_end)
            os.close(write_end)

    with_client(tmp_path, body)


def test_input_that_somebody_else_has_taken_is_waited_for() -> None:
    """Two that share a pipe that one of them has made non-blocking."""

    async def scenario() -> None:
        reading, writing = os.pipe2(os.O_NONBLOCK)
        ours, theirs = os.dup(reading), os.dup(reading)
        both = {asyncio.create_task(LocalReader(fd).read()) for fd in (ours, theirs)}
        for word in (b"one", b"two"):
            await asyncio.sleep(0.01)
            os.write(writing, word)
            done, both = await asyncio.wait(both, timeout=5, return_when=asyncio.FIRST_COMPLETED)
            assert [task.result() for task in done] == [word]
        for fd in (reading, writing, ours, theirs):
            os.close(fd)

    asyncio.run(scenario())


def test_broken_local_output_ends_the_process_as_at_home(tmp_path: Path) -> None:
    async def body(agent: FakeAgent, client: Client) -> None:
        read_end, write_end = os.pipe()
        os.close(read_end)
        script = Script(stdout=b"nobody reads this", runs_until_killed=True)
        try:
            code, _ = await bridged(agent, client, script, stdout=write_end)
        finally:
            os.close(write_end)
        assert script.killed_by == ["SIGPIPE"]
        assert code == 143

    with_client(tmp_path, body)


def test_a_process_that_reads_no_more_stops_the_input_quietly(tmp_path: Path) -> None:
    async def body(agent: FakeAgent, client: Client) -> None:
        async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.close()

        script = Script(stdout=b"done", code=0)
        script.install(agent)
        agent.streams["stdin"] = hang_up
        with (tmp_path / "zeros").open("wb+") as zeros, (tmp_path / "out").open("wb") as out:
            zeros.truncate(32 << 20)
            params = CreateContainer("c", spec={}, stdio=Stdio(ON, ON))
            async with await RemoteProcess.create(client, params) as process:
                await process.start()
                record = await bridge(process, LocalStdio(zeros.fileno(), out.fileno(), out.fileno()))
        assert record.exit_code == 0
        assert (tmp_path / "out").read_bytes() == b"done"

    with_client(tmp_path, body)


def test_output_lost_on_the_way_is_an_error(tmp_path: Path) -> None:
    async def body(agent: FakeAgent, client: Client) -> None:
        async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"half")
            writer.write_eof()
            await reader.read()

        script = Script(stdout=b"half and the rest")
        script.install(agent)
        agent.streams["stdout"] = cut
        with (tmp_path / "out").open("wb") as out:
            params = CreateContainer("c", spec={}, stdio=Stdio(stdout=ON))
            async with await RemoteProcess.create(client, params) as process:
                await process.start()
                with pytest.raises(OutputTruncated, match="4 of 17 bytes"):
                    await bridge(process, LocalStdio(None, out.fileno(), out.fileno()))

    with_client(tmp_path, body)


def test_signals_name_their_process_and_no_input_needs_no_end(tmp_path: Path) -> None:
    async def body(agent: FakeAgent, client: Client) -> None:
        agent.handlers["process.kill"] = lambda params: Empty()
        process = RemoteProcess(client, "c", "p")
        await process.kill("KILL")
        assert agent.named("process.kill") == [{"container": "c", "process": "p", "signal": "KILL"}]
        await process.end_input()  # no input, nothing to end
        assert agent.named("process.close_stdin") == []

    with_client(tmp_path, body)
