"""What a restarted agent makes of what it finds: broken files, a full disk, many processes, strays."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import msgpack
import pytest

from gcsagent.host.client import Client
from gcsagent.host.process import RemoteProcess
from gcsagent.host.spec import exec_spec
from protocol.errors import Code, RpcError
from protocol.families.process import Exec
from protocol.families.stream import StreamName
from protocol.schema import to_wire
from protocol.types import Reason, Status
from tests.cases.agents import RunningAgent, eventually, stopped_clean
from tests.cases.target import (
    OUTPUT,
    PIPES,
    Target,
    connect,
    creation,
    event,
    executing,
    expect,
    name,
    refused,
    remove,
    run,
    terminal,
)
from tests.fakes.slow_runc import Slow

REPO = Path(__file__).parents[2]
ENDING = f"{REPO / 'tests' / 'fakes' / 'ending'}{os.pathsep}{REPO}"
LONG = os.environ.get("GCS_CHAOS") == "long"
LIVE_EXECS = 1000 if LONG else 60


@pytest.fixture
def fresh() -> Iterator[RunningAgent]:
    yield from stopped_clean(RunningAgent("--log-level", "debug"))


@pytest.fixture
def unlucky() -> Iterator[RunningAgent]:
    yield from stopped_clean(RunningAgent("--log-level", "debug", python_path=ENDING))


def at(running: RunningAgent, rootfs: str) -> Target:
    return Target(running.address, rootfs, box="", pace=3.0, execs=1)


async def _start(client: Client, target: Target, *args: str) -> str:
    params = creation(target, name("c"), args or ("sleep", "100000"))
    await client.create_container(params)
    await client.start_container(params.container)
    return params.container


TRAP = "trap 'echo bye; exit 9' TERM; echo ready; while :; do sleep 0.01; done"


def test_a_paused_container_stays_paused_and_can_be_resumed(fresh: RunningAgent, rootfs: str) -> None:
    """A second one is left paused: that the agent still stops cleanly is the fixture's to see."""
    target = at(fresh, rootfs)

    async def before() -> tuple[str, str, int]:
        async with await connect(target) as client:
            one, two = [await _start(client, target, "sh", "-c", TRAP) for _ in range(2)]
            async with await client.events() as events:
                await client.pause_container(one)
                last = await event(events, "container.paused", one)
            await client.pause_container(two)
            return one, two, last.seq

    async def after(one: str, two: str, seq: int) -> None:
        async with await connect(target) as client, await client.events(after=seq) as events:
            for ident in (one, two):
                assert (await client.container_state(ident)).status is Status.PAUSED
            with refused(Code.FAILED_PRECONDITION):
                await run(client, one, "true")
            await client.resume_container(one)
            told = [(await anext(events)) for _ in range(2)]
            assert [(each.type, each.container) for each in told] == [
                ("container.paused", two),
                ("container.resumed", one),
            ]
            assert (await run(client, one, "echo", "alive")).stdout == b"alive\n"
            await client.kill_container(one, "TERM")
            assert (await client.wait_container(one)).exit_code == 9

    one, two, seq = asyncio.run(before())
    fresh.kill_agent()
    asyncio.run(after(one, two, seq))


BREAKAGES: dict[str, Callable[[str], str]] = {
    "truncated": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "rubbish": lambda text: "\0\xff{[",
    "another shape": lambda text: "[1, 2]",
    "wrong types": lambda text: '{"version": "x", "status": 3}',
    "from the future": lambda text: text.replace('"version": 1', '"version": 999'),
}


@pytest.mark.parametrize("file", ["container.json", "process.json"])
@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_broken_state_file_is_kept_and_named_and_the_rest_goes_on(
    fresh: RunningAgent, rootfs: str, file: str, breakage: str
) -> None:
    target = at(fresh, rootfs)

    async def before() -> tuple[str, str]:
        async with await connect(target) as client:
            return await _start(client, target), await _start(client, target)

    async def after(broken: str, whole: str, path: Path, text: str) -> None:
        async with await connect(target) as client:
            state = await client.container_state(broken)
            assert state.status is Status.FAILED
            assert str(path.parents[0 if file == "container.json" else 1]) in state.problem
            assert path.read_text(encoding="latin-1") == text
            with refused(Code.FAILED_PRECONDITION):
                await client.exec_process(Exec(broken, "p", exec_spec(args=("true",), terminal=False)))
            assert (await run(client, whole, "echo", "well")).stdout == b"well\n"
            await client.delete_container(broken, force=True)
            await remove(client, whole)
            assert await client.list_containers() == ()

    broken, whole = asyncio.run(before())
    directory = fresh.state_dir / "containers" / broken
    path = directory / file if file == "container.json" else next(directory.glob("[0-9]*")) / file
    text = BREAKAGES[breakage](path.read_text())
    path.write_text(text, encoding="latin-1")
    fresh.kill_agent()
    asyncio.run(after(broken, whole, path, text))


@pytest.mark.timeout(600)
def test_many_live_execs_across_a_restart(fresh: RunningAgent, rootfs: str) -> None:
    target = at(fresh, rootfs)

    async def body() -> None:
        async with await connect(target) as client:
            box = await _start(client, target)
            gate = asyncio.Semaphore(4)

            async def begin(number: int) -> RemoteProcess:
                async with gate:
                    script = f'read line; echo "$line"; exit {number % 200}'
                    spec = exec_spec(args=("sh", "-c", script), terminal=False)
                    return await RemoteProcess.exec(
                        client, Exec(box, f"p{number}", spec, PIPES), attached=False
                    )

            processes = await asyncio.gather(*(begin(number) for number in range(LIVE_EXECS)))
            await asyncio.to_thread(fresh.kill_agent)
            state = await client.container_state(box)
            assert [each.status for each in state.processes] == [Status.RUNNING] * (LIVE_EXECS + 1)

            async def finish(number: int, process: RemoteProcess) -> None:
                async with gate, await RemoteProcess.attach(client, box, process.process) as again:
                    completed = await again.communicate(f"line {number}\n".encode())
                    assert completed.stdout == f"line {number}\n".encode()
                    assert completed.exit.exit_code == number % 200

            await asyncio.gather(*(finish(number, each) for number, each in enumerate(processes)))
            await remove(client, box)

    asyncio.run(body())


@contextlib.contextmanager
def small_disk(path: Path, size: str) -> Iterator[Path]:
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], check=True, timeout=10)
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True, timeout=10)


def test_a_full_disk_loses_no_exit_and_says_what_is_wrong(tmp_path: Path, rootfs: str) -> None:
    with small_disk(tmp_path / "disk", "2m") as disk:
        for running in stopped_clean(RunningAgent(state_dir=disk / "state")):
            target = at(running, rootfs)

            async def body(target: Target = target, running: RunningAgent = running) -> None:
                async with await connect(target) as client:
                    params = creation(target, name("c"), ("sh", "-c", "sleep 100000"), overlay=False)
                    await client.create_container(params)
                    await client.start_container(params.container)
                    _fill(disk / "ballast")
                    with refused(Code.RESOURCE_EXHAUSTED):
                        await client.create_container(creation(target, name("c"), ("true",), overlay=False))
                    await client.kill_container(params.container, "KILL")
                    assert (await client.wait_container(params.container)).exit_code == 137
                    await asyncio.to_thread(running.kill_agent)
                    assert (await client.wait_container(params.container)).exit_code == 137
                    (disk / "ballast").unlink()
                    await remove(client, params.container)
                    assert await client.list_containers() == ()

            asyncio.run(body())


def _fill(path: Path) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    with contextlib.suppress(OSError):
        while os.write(fd, b"\0" * 4096):
            pass
    os.close(fd)


def test_a_host_that_vanishes_at_any_byte_of_a_request_leaves_all_or_nothing(
    fresh: RunningAgent, rootfs: str
) -> None:
    target = at(fresh, rootfs)
    hello = msgpack.packb([0, 1, "agent.hello", [{"protocol_min": 1, "protocol_max": 1}]])

    async def body() -> None:
        async with await connect(target) as client:
            before = fresh.holdings()
            ident = name("c")
            spec = {
                "ociVersion": "1.0.2",
                "root": {"path": rootfs},
                "process": {"args": ["true"], "cwd": "/"},
            }
            request = msgpack.packb([0, 2, "container.create", [{"container": ident, "spec": spec}]])
            whole = hello + request
            for cut in range(len(whole)):
                _, writer = await asyncio.open_unix_connection(fresh.socket_path)
                writer.write(whole[:cut])
                writer.transport.close() if cut % 2 else writer.transport.abort()
            assert await client.list_containers() == ()
            fresh.assert_holds(before)

    asyncio.run(body())


def test_events_go_on_counting_and_can_be_replayed(fresh: RunningAgent, rootfs: str) -> None:
    target = at(fresh, rootfs)

    async def body() -> None:
        async with await connect(target) as client, await client.events(after=0) as events:
            box = await _start(client, target)
            await asyncio.to_thread(fresh.kill_agent)
            await client.kill_container(box, "KILL")
            seen = []
            async for event in events:
                seen.append(event)
                if event.type == "container.stopped":
                    break
            await asyncio.to_thread(fresh.kill_agent)
            replayed = []
            async with await client.events(after=0) as replay:
                async for event in replay:
                    replayed.append(event)
                    if event.type == "container.stopped":
                        break
                assert replay.dropped == 0
            assert [to_wire(event) for event in replayed] == [to_wire(event) for event in seen]
            assert [event.seq for event in seen] == list(range(1, len(seen) + 1))
            kinds = [event.type for event in seen]
            assert kinds.count("process.exited") == kinds.count("container.stopped") == 1
            await remove(client, box)

    asyncio.run(body())


def test_a_process_that_ends_while_no_agent_runs(fresh: RunningAgent, rootfs: str) -> None:
    """Its exit, and the output nobody had read, are there for the next agent."""
    target = at(fresh, rootfs)

    async def body() -> None:
        async with await connect(target) as client:
            params = creation(target, name("c"), ("sh", "-c", TRAP), stdio=OUTPUT)
            await client.create_container(params)
            await client.start_container(params.container)
            agent, init = fresh.agent_pid, (await client.container_state(params.container)).pid
            os.kill(agent, signal.SIGSTOP)  # there, and not looking
            ending = os.pidfd_open(init)
            os.kill(init, signal.SIGTERM)
            await asyncio.to_thread(select.select, [ending], [], [], 20)
            os.close(ending)
            os.kill(agent, signal.SIGKILL)
            record = await client.wait_container(params.container)
            assert (record.exit_code, record.streams["stdout"]) == (9, len("ready\nbye\n"))
            async with await client.attach(params.container) as stdout:
                assert await expect(stdout, b"(?s).*bye\n") == b"ready\nbye\n"
            await remove(client, params.container)

    asyncio.run(body())


def test_a_process_that_ends_while_an_agent_finds_out_what_there_is(
    unlucky: RunningAgent, rootfs: str
) -> None:
    """It was alive when the supervisor was asked, and is not when its descriptor is: no trouble, an exit."""
    target = at(unlucky, rootfs)

    async def body() -> None:
        async with await connect(target) as client:
            container = await _start(client, target)
            spec = exec_spec(args=("sh", "-c", "echo here; exec sleep 100000"))
            async with await RemoteProcess.exec(client, Exec(container, "ending", spec, OUTPUT)) as process:
                await expect(process.streams["stdout"], b"here\n")
                os.kill(unlucky.agent_pid, signal.SIGKILL)
                record = await process.wait()
                assert (record.exit_code, record.signal, record.reason) == (137, 9, Reason.SIGNALLED)
                state = await client.container_state(container)
                assert (state.status, state.problem) == (Status.RUNNING, "")
                assert (await run(client, container, "echo", "alive")).stdout == b"alive\n"
            await remove(client, container)

    asyncio.run(body())


def test_an_exec_whose_end_was_written_and_not_moved_is_deleted_whole(
    fresh: RunningAgent, rootfs: str
) -> None:
    """An agent killed between the two steps; its directory would come back with every restart."""
    target = at(fresh, rootfs)

    async def body() -> None:
        async with await connect(target) as client:
            params = creation(target, name("c"), ("sleep", "100000"))
            await client.create_container(params)
            await client.start_container(params.container)
            async with executing(client, params.container, "true") as process:
                await process.wait()
                await _killed_before_the_move(fresh, client, process)
                state = await client.process_state(params.container, process.process)
                assert state.exit is not None
                ended = fresh.state_dir / "containers" / params.container / "exited"
                assert [each.name for each in ended.iterdir()] == [process.process]
            directory = fresh.state_dir / "containers" / params.container
            init = (await client.container_state(params.container)).pid
            assert [*directory.glob("**/process.json")] == [directory / str(init) / "process.json"]
            await remove(client, params.container)

    asyncio.run(body())


async def _killed_before_the_move(agent: RunningAgent, client: Client, process: RemoteProcess) -> None:
    directory = agent.state_dir / "containers" / process.container
    generation, pid = (await client.ping()).generation, agent.agent_pid
    os.kill(pid, signal.SIGSTOP)
    (directory / "exited" / process.process).rename(directory / str(process.pid))
    os.kill(pid, signal.SIGKILL)
    while (await client.ping()).generation == generation:
        pass


SIZE = "stty size; exec cat"


@pytest.mark.parametrize("call", ["create", "exec"])
def test_a_terminal_that_comes_from_the_runtime_after_its_agent_is_there(slow: Slow, call: str) -> None:
    """The runtime's call outlives the agent that asked for it, and what it sends then is nobody else's."""

    async def body() -> None:
        async with await connect(slow.target) as client, asyncio.timeout(60):
            params = creation(slow.target, name("c"), ("sh", "-c", SIZE), stdio=terminal(33, 77))
            made, process = params.container, "init"
            (slow.directory / "slow").write_text(call)
            if call == "create":
                asking = asyncio.ensure_future(client.create_container(params))
            else:
                made, process = await _start(client, slow.target), "p"
                spec = exec_spec(args=("sh", "-c", SIZE), terminal=True)
                asking = asyncio.ensure_future(
                    client.exec_process(Exec(made, process, spec, terminal(33, 77)))
                )
            async with slow.killed_during():
                pass
            await asking
            async with await client.attach(made, process, StreamName.TTY) as tty:
                if call == "create":
                    await client.start_container(made)
                await expect(tty, rb"33 77\r\n")
                await tty.write(b"still here\n")
                await expect(tty, rb"(?s)still here\r\n.*still here\r\n")
            await remove(client, made)

    asyncio.run(body())


def test_unknown_containers_of_the_runtime_are_removed(fresh: RunningAgent, rootfs: str) -> None:
    target = at(fresh, rootfs)

    async def body() -> None:
        async with await connect(target) as client:
            box = await _start(client, target)
            stray = creation(target, "stray", ("sleep", "100000"), overlay=False).spec
            assert stray is not None
            bundle = fresh.directory / "stray"
            bundle.mkdir()
            (bundle / "config.json").write_text(json.dumps(stray))
            root = ["runc", "--root", str(fresh.state_dir / "runtime" / "runc")]
            await asyncio.to_thread(_quietly, [*root, "create", "--bundle", str(bundle), "stray"])
            await asyncio.to_thread(fresh.kill_agent)
            with pytest.raises(RpcError):
                await client.container_state("stray")
            await asyncio.to_thread(_gone, root)
            assert (await client.container_state(box)).status is Status.RUNNING
            await remove(client, box)

    asyncio.run(body())


def _quietly(command: list[str]) -> None:
    null = subprocess.DEVNULL
    subprocess.run(command, check=True, timeout=20, stdin=null, stdout=null, stderr=null)


def _gone(root: list[str]) -> None:
    def absent() -> bool:
        listed = subprocess.run([*root, "list", "-q"], capture_output=True, text=True, timeout=20)
        # It fails when a state it is about to read is being removed: that is what is waited for.
        return listed.returncode == 0 and "stray" not in listed.stdout.split()

    assert eventually(absent), "the runtime still knows it"
