"""SIGKILL at every step that writes state: afterwards the request is wholly done, and was done once.

The steps are walked, not drawn: a request is made with the agent killed at its first step, then at its
second, and so on until it gets through without meeting the kill. The client repeats by itself what a lost
connection left unanswered, as every client may; what it gets in the end must be true.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from gcsagent.host.checkpoints import (
    delete_checkpoint,
    list_checkpoints,
    make_checkpoint,
    restore_container,
)
from gcsagent.host.client import Client
from gcsagent.host.forward import ForwardStream
from gcsagent.host.process import RemoteProcess
from gcsagent.host.streams import Stream
from protocol.errors import Code, RpcError
from protocol.families.checkpoint import MakeCheckpoint, Restore
from protocol.families.container import CreateContainer
from protocol.families.forward import OpenForward
from protocol.families.process import Exec
from protocol.families.stream import StreamName
from protocol.pods import Dns, PodLimits, PodMember, PodNamespace, Sandbox
from protocol.types import Status, Stdio, StreamMode, StreamSpec
from tests.cases.agents import RunningAgent, frozen, stopped_clean
from tests.cases.fifos import LOCATION, SIDE_CAR
from tests.cases.files import get, members, put, tar
from tests.cases.target import (
    MIB,
    OUTPUT,
    PIPES,
    Target,
    connect,
    creation,
    expect,
    name,
    refused,
    remove,
    terminal,
)

FAULTS = Path(__file__).parents[1] / "fakes" / "faults"
SHELF = Path(__file__).parents[1] / "fakes" / "shelf"
MOST_STEPS = 120
STRIDE = 1 if os.environ.get("GCS_CHAOS") == "long" else 5
PIECE = b"every byte once "


@dataclass(frozen=True, slots=True)
class Bench:
    """An agent that can be told to die, and a client that does not mind."""

    running: RunningAgent
    target: Target
    client: Client

    def arm(self, step: int) -> None:
        fault = self.running.directory / "fault"
        fault.write_text(str(step))
        os.kill(self.running.agent_pid, signal.SIGUSR2)

    def steps(self) -> str:
        trace = self.running.directory / "fault.steps"
        return trace.read_text() if trace.exists() else "nothing"


@pytest.fixture(scope="module")
def faulty(rootfs: str) -> Iterator[RunningAgent]:
    yield from stopped_clean(RunningAgent("--log-level", "debug", python_path=str(FAULTS)))


@pytest.fixture(scope="module")
def faulty_with_crun(rootfs: str) -> Iterator[RunningAgent]:
    agent = RunningAgent("--log-level", "debug", runtime="crun", python_path=str(FAULTS))
    yield from stopped_clean(agent)


@pytest.fixture(scope="module")
def faulty_shelf(rootfs: str) -> Iterator[RunningAgent]:
    """Its runtime makes checkpoints without CRIU."""
    path = f"{SHELF}:{os.environ['PATH']}"
    agent = RunningAgent("--log-level", "debug", runtime="shelving", path=path, python_path=str(FAULTS))
    yield from stopped_clean(agent)


Act = Callable[[], Awaitable[None]]


async def _walk(
    running: RunningAgent, rootfs: str, attempt: Callable[[Bench, Act], Awaitable[None]], stride: int
) -> int:
    """Calls ``attempt`` with the kill at step 1, 2, ...; it calls its second argument before what is tested.

    Returns the number of steps that were walked.
    """
    target = Target(running.address, rootfs, box="", pace=2.0, execs=1)
    for step in range(1, MOST_STEPS, stride):
        async with await connect(target) as client, asyncio.timeout(40):
            bench = Bench(running, target, client)
            before = (await client.ping()).generation

            async def arm(bench: Bench = bench, step: int = step) -> None:
                bench.arm(step)
                await bench.client.ping()  # the signal has been taken up

            try:
                await attempt(bench, arm)
            except BaseException as error:
                error.add_note(f"killed at step {step}; the steps were:\n{bench.steps()}")
                raise
            survived = (await client.ping()).generation == before
        if survived:
            # Still armed: that agent would die at some later, innocent moment.
            os.kill(running.agent_pid, signal.SIGKILL)
            await asyncio.to_thread(running.wait_for_generation, before + 1)
            return step - 1
    raise AssertionError(f"more than {MOST_STEPS} steps")


def walk(
    running: RunningAgent,
    rootfs: str,
    attempt: Callable[[Bench, Act], Awaitable[None]],
    stride: int = 1,
) -> None:
    before = running.holdings()
    steps = asyncio.run(_walk(running, rootfs, attempt, stride))
    running.assert_holds(before)
    assert steps > 0, "the agent was never killed: no step was met"
    which = "each" if stride == 1 else f"every {stride}rd"
    print(f"\n{attempt.__name__}: killed at {which} of {steps} steps")


@asynccontextmanager
async def _box(bench: Bench) -> AsyncIterator[str]:
    params = creation(bench.target, name("box"), ("sleep", "100000"))
    await bench.client.create_container(params)
    try:
        await bench.client.start_container(params.container)
        yield params.container
    finally:
        await remove(bench.client, params.container)


async def create(bench: Bench, arm: Act) -> None:
    params = creation(bench.target, name("c"), ("true",), stdio=PIPES)
    await arm()
    created = await bench.client.create_container(params)
    try:
        state = await bench.client.container_state(params.container)
        assert (state.status, state.pid) == (Status.CREATED, created.pid)
        await bench.client.start_container(params.container)
        assert (await bench.client.wait_container(params.container)).exit_code == 0
    finally:
        await remove(bench.client, params.container)


async def create_with_fifos(bench: Bench, arm: Act) -> None:
    """One fifo is made here and removed again, one was there before and stays."""
    made, given = bench.running.directory / "fifo-made", bench.running.directory / "fifo-given"
    os.mkfifo(given)
    stdin, stdout = (StreamSpec(StreamMode.FIFO, path=str(path)) for path in (made, given))
    params = creation(bench.target, name("c"), ("cat",), stdio=Stdio(stdin, stdout))
    await arm()
    try:
        await bench.client.create_container(params)
        await bench.client.start_container(params.container)
        with given.open("rb") as output:
            made.write_bytes(PIECE)
            assert await asyncio.to_thread(output.read, len(PIECE)) == PIECE
            await bench.client.close_stdin(params.container, "init")
            assert (await bench.client.wait_container(params.container)).exit_code == 0
            assert output.read() == b"", "the process is gone, but its end is still open"
    finally:
        await remove(bench.client, params.container)
    assert given.is_fifo()
    given.unlink()
    left = [path.name for path in bench.running.directory.iterdir() if path.is_fifo()]
    assert left == [], left


async def create_side_car(bench: Bench, arm: Act) -> None:
    """The workload goes first; what it wrote is read, and the pipes go with the second of the two."""
    location = str(bench.running.directory / "log")

    def workload(spec: dict[str, Any]) -> None:
        spec["annotations"] = {LOCATION: location}

    def side_car(spec: dict[str, Any]) -> None:
        spec["annotations"] = {LOCATION: location, SIDE_CAR: "true"}

    writer = creation(bench.target, name("c"), ("echo", "written"), spec=workload)
    reader = creation(bench.target, name("c"), ("head", "-n1", "/dev/fd/3"), spec=side_car, stdio=OUTPUT)
    await bench.client.create_container(writer)
    try:
        await bench.client.start_container(writer.container)
        assert (await bench.client.wait_container(writer.container)).exit_code == 0
        await arm()
        await bench.client.create_container(reader)
        await bench.client.delete_container(writer.container)
        async with await bench.client.attach(reader.container) as stdout:
            await bench.client.start_container(reader.container)
            await expect(stdout, b"written\n")
        assert (await bench.client.wait_container(reader.container)).exit_code == 0
    finally:
        await remove(bench.client, reader.container)
        await remove(bench.client, writer.container)
    left = [path.name for path in bench.running.directory.iterdir() if path.is_fifo()]
    assert left == [], left


async def start(bench: Bench, arm: Act) -> None:
    params = creation(bench.target, name("c"), ("sh", "-c", "echo started; exit 5"), stdio=OUTPUT)
    init = await RemoteProcess.create(bench.client, params)
    try:
        await arm()
        await init.start()
        completed = await init.communicate()
        assert (completed.stdout, completed.exit.exit_code) == (b"started\n", 5)
    finally:
        init.detach()
        await remove(bench.client, params.container)


async def exec_once(bench: Bench, arm: Act) -> None:
    """The command counts how often it was run."""
    async with _box(bench) as box:
        await arm()
        command = {"args": ["sh", "-c", "echo ran >>/tmp/count; cat /tmp/count; exit 6"], "cwd": "/"}
        params = Exec(box, name("p"), command, OUTPUT)
        process = await RemoteProcess.exec(bench.client, params)
        completed = await process.communicate()
        process.detach()
        assert (completed.stdout, completed.exit.exit_code) == (b"ran\n", 6)


async def attach(bench: Bench, arm: Act) -> None:
    params = creation(bench.target, name("c"), ("sh", "-c", "echo before; cat"), stdio=PIPES)
    await bench.client.create_container(params)
    try:
        await bench.client.start_container(params.container)
        await arm()
        async with (
            await bench.client.attach(params.container, stream=StreamName.STDIN) as stdin,
            await bench.client.attach(params.container) as stdout,
        ):
            await expect(stdout, b"before\n")
            for _ in range(20):
                await stdin.write(PIECE)
            await bench.client.close_stdin(params.container, "init", stdin.input_position)
            assert (await expect(stdout, b"(%s){20}" % PIECE)) == PIECE * 20
            assert (await bench.client.wait_container(params.container)).exit_code == 0
    finally:
        await remove(bench.client, params.container)


async def close_stdin(bench: Bench, arm: Act) -> None:
    params = creation(bench.target, name("c"), ("cat",), stdio=PIPES)
    init = await RemoteProcess.create(bench.client, params)
    try:
        await init.start()
        await init.streams["stdin"].write(PIECE)
        await arm()
        await init.end_input()
        completed = await init.communicate()
        assert (completed.stdout, completed.exit.exit_code) == (PIECE, 0)
    finally:
        init.detach()
        await remove(bench.client, params.container)


async def end_a_terminals_input(bench: Bench, arm: Act) -> None:
    """Told before the bytes come, and then at once: each end is typed once, and ends one of the three."""
    program = ("sh", "-c", "for n in 1 2 3; do cat; echo end $n; done; exit 9")
    params = creation(bench.target, name("c"), program, stdio=terminal())
    init = await RemoteProcess.create(bench.client, params)
    try:
        await init.start()
        tty = init.streams["tty"]
        await arm()
        await bench.client.close_stdin(params.container, "init", 4)
        for number in (b"1", b"2", b"3"):
            await tty.write(b"no%s\n" % number)
            seen = rb"no%s\r\nno%s\r\n" % (number, number)
            await expect(tty, seen + b"end 1\r\n" if number == b"1" else seen)
            if number != b"1":
                await bench.client.close_stdin(params.container, "init")
                await expect(tty, b"end %s\r\n" % number)
        assert (await init.wait()).exit_code == 9
    finally:
        init.detach()
        await remove(bench.client, params.container)


async def forward(bench: Bench, arm: Act) -> None:
    """Opened and given its end; the target may have seen an attempt that came to nothing."""
    answered = asyncio.Event()

    async def turn_round(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            writer.write(await reader.read())
            writer.close()
        answered.set()

    server = await asyncio.start_server(turn_round, "127.0.0.1", 0)
    async with server:
        await arm()
        to = OpenForward(port=server.sockets[0].getsockname()[1])
        async with await ForwardStream.open(bench.client, to) as stream:
            await stream.write(PIECE)
            await stream.close_write()
            assert await stream.read(100) + await stream.read(100) == PIECE
        await answered.wait()


async def delete(bench: Bench, arm: Act) -> None:
    params = creation(bench.target, name("c"), ("sleep", "100000"), stdio=PIPES)
    await bench.client.create_container(params)
    await bench.client.start_container(params.container)
    await arm()
    record = await bench.client.delete_container(params.container, force=True)
    assert record is not None
    assert record.signal == 9
    with pytest.raises(RpcError) as gone:
        await bench.client.container_state(params.container)
    assert gone.value.code is Code.NOT_FOUND
    told = await _told_of(bench, params.container)
    assert told.count("container.deleted") == 1, told


async def _told_of(bench: Bench, container: str) -> list[str]:
    """What kinds of events there have been, up to now."""
    found = []
    async with await bench.client.events(after=0) as events:
        while events.position < events.last:
            event = await anext(events)
            found += [event.type] if event.container == container else []
    return found


async def kill(bench: Bench, arm: Act) -> None:
    """The signal may have ended it before the agent could answer."""
    async with _box(bench) as box:
        params = Exec(box, name("p"), {"args": ["sleep", "100000"], "cwd": "/"})
        await bench.client.exec_process(params)
        await arm()
        await bench.client.kill_process(box, params.process, "SIGKILL")
        assert (await bench.client.wait_process(box, params.process)).signal == 9
        await bench.client.kill_container(box, "SIGKILL")
        assert (await bench.client.wait_container(box)).signal == 9


async def delete_process(bench: Bench, arm: Act) -> None:
    """It had a fifo made for it, which goes with it."""
    made = bench.running.directory / "fifo-made"
    async with _box(bench) as box:
        stdio = Stdio(StreamSpec(StreamMode.FIFO, path=str(made)), OUTPUT.stdout)
        params = Exec(box, name("p"), {"args": ["sh", "-c", "exit 7"], "cwd": "/"}, stdio)
        await bench.client.exec_process(params)
        assert (await bench.client.wait_process(box, params.process)).exit_code == 7
        await arm()
        record = await bench.client.delete_process(box, params.process)
        assert record is not None
        assert record.exit_code == 7
        assert not made.exists()
        state = await bench.client.container_state(box)
        assert [each.process for each in state.processes] == ["init"]
        assert list((bench.running.state_dir / "containers" / box / "exited").iterdir()) == []


async def pause(bench: Bench, arm: Act) -> None:
    """Afterwards it is paused as its status says: nothing in it runs, until it is resumed."""
    async with _counting(bench) as (box, out):
        await arm()
        await bench.client.pause_container(box)
        assert (await bench.client.container_state(box)).status is Status.PAUSED
        assert frozen((await bench.client.container_state(box)).pid)
        await bench.client.resume_container(box)
        await expect(out, b"[0-9]+\n")
        await _told(bench, box)


async def resume(bench: Bench, arm: Act) -> None:
    async with _counting(bench) as (box, out):
        await bench.client.pause_container(box)
        await arm()
        await bench.client.resume_container(box)
        assert (await bench.client.container_state(box)).status is Status.RUNNING
        assert not frozen((await bench.client.container_state(box)).pid)
        await expect(out, b"[0-9]+\n")
        await _told(bench, box)


async def update(bench: Bench, arm: Act) -> None:
    async with _box(bench) as box:
        await bench.client.update_container(box, memory_bytes=96 * MIB)
        await arm()
        await bench.client.update_container(box, pids=77, cpus=0.5)
        found = await bench.client.container_stats(box)
        assert (found.pids.limit, found.cpu.limit, found.memory.limit) == (77, 0.5, 96 * MIB)
        await bench.client.update_container(box, pids=78)  # nothing older comes after it
        found = await bench.client.container_stats(box)
        assert (found.pids.limit, found.cpu.limit) == (78, 0.5)


async def put_files(bench: Bench, arm: Act) -> None:
    """Until the archiver has it, the connection is the agent's; afterwards its death is nothing to it."""
    async with _box(bench) as box:
        data = tar(("file", b"f" * 200_000, {}))
        await arm()
        await put(bench.client, box, "/srv", data)
        assert set(members((await get(bench.client, box, "/srv/."))[0])) == {".", "./file"}


async def create_sandbox(bench: Bench, arm: Act) -> None:
    """With everything there is to make for a pod: files, a mount, limits."""
    sandbox = Sandbox(dns=Dns(("10.0.0.1",)), limits=PodLimits(pids=70))
    script = "grep -qx 'nameserver 10.0.0.1' /etc/resolv.conf && grep -q ' /dev/shm ' /proc/mounts"
    params = creation(bench.target, name("pod"), ("sh", "-c", script), sandbox=sandbox)
    await arm()
    await bench.client.create_container(params)
    try:
        assert (await bench.client.pod_stats(params.container)).pids.limit == 70
        await bench.client.start_container(params.container)
        assert (await bench.client.wait_container(params.container)).exit_code == 0
    finally:
        await remove(bench.client, params.container)


async def create_in_pod(bench: Bench, arm: Act) -> None:
    async with _pod(bench) as sandbox:
        pod = PodMember(sandbox, (PodNamespace.IPC, PodNamespace.PID))
        script = "[ $$ != 1 ] && grep -qx shared /dev/shm/file"
        params = creation(bench.target, name("c"), ("sh", "-c", script), pod=pod)
        await arm()
        await bench.client.create_container(params)
        with pytest.raises(RpcError, match=params.container) as caught:
            await bench.client.delete_container(sandbox)
        assert caught.value.code is Code.FAILED_PRECONDITION
        assert (await bench.client.container_state(params.container)).pod == sandbox
        await bench.client.start_container(params.container)
        assert (await bench.client.wait_container(params.container)).exit_code == 0
        await bench.client.delete_container(params.container)


async def delete_pod(bench: Bench, arm: Act) -> None:
    async with _pod(bench) as sandbox:
        params = creation(bench.target, name("c"), ("sleep", "100000"), pod=PodMember(sandbox))
        await bench.client.create_container(params)
        await bench.client.start_container(params.container)
        await arm()
        record = await bench.client.delete_container(sandbox, force=True)
        assert record is not None
        assert record.signal == 9
        for gone in (params.container, sandbox):
            with pytest.raises(RpcError) as caught:
                await bench.client.container_state(gone)
            assert caught.value.code is Code.NOT_FOUND


async def update_pod(bench: Bench, arm: Act) -> None:
    async with _pod(bench) as sandbox:
        await bench.client.update_pod(sandbox, memory_bytes=96 * MIB)
        await arm()
        await bench.client.update_pod(sandbox, pids=77, cpus=0.5)
        found = await bench.client.pod_stats(sandbox)
        assert (found.pids.limit, found.cpu.limit, found.memory.limit) == (77, 0.5, 96 * MIB)


@asynccontextmanager
async def _pod(bench: Bench) -> AsyncIterator[str]:
    script = "echo shared >/dev/shm/file; echo ready; exec sleep 100000"
    params = creation(bench.target, name("pod"), ("sh", "-c", script), sandbox=Sandbox(), stdio=OUTPUT)
    init = await RemoteProcess.create(bench.client, params)
    try:
        await init.start()
        await expect(init.streams["stdout"], b"ready\n")
        init.detach()
        yield params.container
    finally:
        init.detach()
        with contextlib.suppress(RpcError):
            await bench.client.delete_container(params.container, force=True)


@asynccontextmanager
async def _counting(bench: Bench) -> AsyncIterator[tuple[str, Stream]]:
    """A container that says a number again and again."""
    script = "n=0; while :; do n=$((n + 1)); echo $n; sleep 0.02; done"
    params = creation(bench.target, name("c"), ("sh", "-c", script), stdio=OUTPUT)
    init = await RemoteProcess.create(bench.client, params)
    try:
        await init.start()
        await expect(init.streams["stdout"], b"[0-9]+\n")
        yield params.container, init.streams["stdout"]
    finally:
        init.detach()
        await remove(bench.client, params.container)


async def _told(bench: Bench, container: str) -> None:
    """That it was paused, once, and then that it was resumed."""
    found = []
    async with await bench.client.events(after=0, container=container) as events:
        async for event in events:
            found += [event.type] if event.type in ("container.paused", "container.resumed") else []
            if event.type == "container.resumed":
                break
    assert found == ["container.paused", "container.resumed"]


async def failed_create(bench: Bench, arm: Act) -> None:
    params = creation(bench.target, name("c"), ("nowhere",), stdio=PIPES)
    await arm()
    with refused(Code.NOT_FOUND, exec_error="not_found"):
        await bench.client.create_container(params)
    await _is_gone(bench, params)


async def failed_start(bench: Bench, arm: Act) -> None:
    """The runtime cannot read the state it wrote: the container goes, and the caller is told why."""
    params = creation(bench.target, name("c"), ("sleep", "100000"), stdio=OUTPUT)
    await bench.client.create_container(params)
    (state,) = (bench.running.state_dir / "runtime").glob(f"*/{params.container}/state.json")
    state.write_text("")
    await arm()
    with refused(Code.INTERNAL):
        await bench.client.start_container(params.container)
    await _is_gone(bench, params)


async def failed_exec(bench: Bench, arm: Act) -> None:
    async with _box(bench) as box:
        params = Exec(box, name("p"), {"args": ["nowhere"], "cwd": "/"}, PIPES)
        await arm()
        with refused(Code.NOT_FOUND, exec_error="not_found"):
            await bench.client.exec_process(params)
        state = await bench.client.container_state(box)
        assert [process.process for process in state.processes] == ["init"]
        again = Exec(box, params.process, {"args": ["true"], "cwd": "/"})
        await bench.client.exec_process(again)
        assert (await bench.client.wait_process(box, again.process)).exit_code == 0


async def _is_gone(bench: Bench, params: CreateContainer) -> None:
    """And its id can be used again."""
    with refused(Code.NOT_FOUND):
        await bench.client.container_state(params.container)
    again = replace(params, spec=creation(bench.target, params.container, ("true",)).spec)
    await bench.client.create_container(again)
    await remove(bench.client, params.container)


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "attempt",
    [
        create,
        start,
        exec_once,
        attach,
        close_stdin,
        end_a_terminals_input,
        forward,
        kill,
        delete_process,
        delete,
    ],
)
def test_killed_at_each_step(
    faulty: RunningAgent, rootfs: str, attempt: Callable[[Bench, Act], Awaitable[None]]
) -> None:
    walk(faulty, rootfs, attempt)


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "attempt",
    [
        create_with_fifos,
        create_side_car,
        failed_create,
        failed_start,
        failed_exec,
        pause,
        resume,
        update,
        put_files,
        create_sandbox,
        create_in_pod,
        delete_pod,
        update_pod,
    ],
)
def test_killed_at_steps(
    faulty: RunningAgent, rootfs: str, attempt: Callable[[Bench, Act], Awaitable[None]]
) -> None:
    """They share most of their steps with those above: every fifth, and all of them in ``make chaos``."""
    walk(faulty, rootfs, attempt, STRIDE)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("attempt", [create, exec_once])
def test_killed_at_each_step_with_crun(
    faulty_with_crun: RunningAgent, rootfs: str, attempt: Callable[[Bench, Act], Awaitable[None]]
) -> None:
    """What the runtime is called for; the rest is the same whatever it is."""
    walk(faulty_with_crun, rootfs, attempt)


WHOLE = ["checkpoint.json", "config.json", "images", "streams", "upper.tar"]
KEEPS = "echo ready; read line; echo $line"


async def checkpoint(bench: Bench, arm: Act) -> None:
    """Made once and whole; the container ends."""
    await _checkpoint(bench, arm, leave=False)


async def checkpoint_left_running(bench: Bench, arm: Act) -> None:
    """Made once and whole; the container runs on as if nothing was."""
    await _checkpoint(bench, arm, leave=True)


async def _checkpoint(bench: Bench, arm: Act, leave: bool) -> None:
    params = creation(bench.target, name("c"), ("sh", "-c", KEEPS), stdio=PIPES)
    wanted = MakeCheckpoint(params.container, name("k"), leave_running=leave)
    await bench.client.create_container(params)
    try:
        await bench.client.start_container(params.container)
        async with await bench.client.attach(params.container) as out:
            await expect(out, b"ready\n")
        await arm()
        made = await make_checkpoint(bench.client, wanted, request_id=wanted.checkpoint)
        assert await list_checkpoints(bench.client) == (made,)
        assert sorted(os.listdir(made.path)) == WHOLE
        state = await bench.client.container_state(params.container)
        assert state.status is (Status.RUNNING if leave else Status.STOPPED)
        if leave:
            async with await bench.client.attach(params.container, stream=StreamName.STDIN) as stdin:
                await stdin.write(b"on\n")
            assert (await bench.client.wait_container(params.container)).exit_code == 0
    finally:
        await remove(bench.client, params.container)
        await delete_checkpoint(bench.client, wanted.checkpoint)


async def restore(bench: Bench, arm: Act) -> None:
    """Once, and it runs; or it never was."""
    params = creation(bench.target, name("c"), ("sh", "-c", KEEPS), stdio=PIPES)
    saved = MakeCheckpoint(params.container, name("k"))
    await bench.client.create_container(params)
    try:
        await bench.client.start_container(params.container)
        await make_checkpoint(bench.client, saved)
    finally:
        await remove(bench.client, params.container)
    wanted = Restore(saved.checkpoint, container=name("r"))
    await arm()
    try:
        made = await restore_container(bench.client, wanted, request_id=wanted.container)
        state = await bench.client.container_state(str(wanted.container))
        assert (state.status, state.pid) == (Status.RUNNING, made.pid)
        async with await bench.client.attach(str(wanted.container), stream=StreamName.STDIN) as stdin:
            await stdin.write(b"on\n")
        assert (await bench.client.wait_container(str(wanted.container))).exit_code == 0
    finally:
        await remove(bench.client, str(wanted.container))
        await delete_checkpoint(bench.client, saved.checkpoint)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("attempt", [checkpoint, checkpoint_left_running, restore])
def test_killed_at_each_step_of_a_checkpoint(
    faulty_shelf: RunningAgent, rootfs: str, attempt: Callable[[Bench, Act], Awaitable[None]]
) -> None:
    walk(faulty_shelf, rootfs, attempt, STRIDE)
