"""Out of memory, and signals to all, across the death of the agent: nothing is lost, nothing said twice."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from gcsagent.host.client import Client
from gcsagent.host.process import RemoteProcess
from protocol.errors import Code, RpcError
from protocol.families.events import Subscribe
from protocol.families.process import Exec
from protocol.schema import from_wire
from protocol.types import Event, Oom, OomScope, Reason, Status
from tests.cases.agents import RunningAgent, eventually, greeted, stopped_clean
from tests.cases.endings import BOMB, HOG, HUNGRY, limited, none_left, shared
from tests.cases.target import (
    OUTPUT,
    Target,
    connect,
    creation,
    executing,
    expect,
    name,
    remove,
    run,
    running,
)
from tests.runc.test_fault_points import FAULTS, Act, Bench, walk
from tests.runc.test_reload import at


@pytest.fixture
def fresh() -> Iterator[RunningAgent]:
    yield from stopped_clean(RunningAgent("--log-level", "debug"))


@pytest.fixture(scope="module")
def mortal(rootfs: str) -> Iterator[RunningAgent]:
    yield from stopped_clean(RunningAgent("--log-level", "debug", python_path=str(FAULTS)))


async def _events(target: Target, container: str, kind: str) -> list[Event]:
    """All of that kind there have been."""
    async with await connect(target) as client:
        last = (await client.call("events.subscribe", Subscribe())).last
    async with await connect(target) as client, await client.events(after=0) as stream:
        found = []
        async for each in stream:
            if (each.type, each.container) == (kind, container):
                found.append(each)
            if each.seq >= last:
                break
        return found


def _count(agent: RunningAgent, container: str) -> int:
    """As the kernel has it, in whichever version's hierarchy the controller is."""
    for directory in [path for path in agent.cgroups() if path.endswith(f"/{container}")]:
        for path in (Path(directory, "memory.events"), Path(directory, "memory.oom_control")):
            if path.exists():
                return int(dict(line.split() for line in path.read_text().splitlines())["oom_kill"])
    raise AssertionError(f"{container} has no memory controller")


def test_kills_while_there_is_no_agent_are_told_by_the_next_and_once(
    fresh: RunningAgent, rootfs: str
) -> None:
    """A child and an exec are killed while the supervisor is held up, so that no agent lives."""
    target = at(fresh, rootfs)
    waits = f"while [ ! -e /tmp/go ]; do sleep 0.01; done; python3 -I -S -c '{HOG}'; echo child $?; exec "
    hog = " ".join(HUNGRY[:-1]) + f" '{HOG}'"

    async def body() -> None:
        async with await connect(target) as client:
            params = creation(target, name("c"), ("sleep", "100000"), spec=limited)
            init = await RemoteProcess.create(client, params)
            await init.start()
            command = {"args": ["sh", "-c", waits + hog], "cwd": "/"}
            process = await RemoteProcess.exec(client, Exec(init.container, "p", command, OUTPUT))
            with greeted(fresh.socket_path, 30.0) as generation:
                pass
            agent, state = fresh.agent_pid, await client.container_state(init.container)
            os.kill(fresh.pid, signal.SIGSTOP)
            try:
                os.kill(agent, signal.SIGKILL)
                Path(f"/proc/{state.pid}/root/tmp/go").touch()
                assert eventually(lambda: _count(fresh, init.container) == 2)
            finally:
                os.kill(fresh.pid, signal.SIGCONT)
            await asyncio.to_thread(fresh.wait_for_generation, generation + 1)
            record = await client.wait_process(init.container, "p")
            assert (record.exit_code, record.reason) == (137, Reason.OOM)
            for _ in range(2):
                [told] = await _events(target, init.container, "container.oom")
                oom = from_wire(Oom, told.data)
                assert (oom.kills, oom.new, oom.scope) == (2, 2, OomScope.CONTAINER)
                assert [each.process for each in oom.victims] == ["", "p"]
                assert record.oom == oom
                await asyncio.to_thread(fresh.kill_agent)
            process.detach()
            init.detach()
            await remove(client, init.container)

    asyncio.run(body())


def test_a_new_agent_watches_as_the_old_one_did(fresh: RunningAgent, rootfs: str) -> None:
    """And takes no earlier kill for the reason of a later SIGKILL."""
    target = at(fresh, rootfs)

    async def body() -> None:
        async with await connect(target) as client, running(target, client, spec=limited) as init:
            child = f"python3 -I -S -c '{HOG}'; true"
            for number in (1, 2):
                await run(client, init.container, "sh", "-c", child)
                told = await _events(target, init.container, "container.oom")
                assert [from_wire(Oom, each.data).kills for each in told] == list(range(1, number + 1))
                await asyncio.to_thread(fresh.kill_agent)
            async with executing(client, init.container, "sh", "-c", "kill -9 $$") as killed:
                record = await killed.wait()
            assert (record.signal, record.reason, record.oom) == (9, Reason.SIGNALLED, None)
            (fresh.state_dir / "containers" / init.container / "oom.json").write_text("{rubbish")
            await asyncio.to_thread(fresh.kill_agent)
            told = await _events(target, init.container, "container.oom")
            assert [from_wire(Oom, each.data).kills for each in told] == [1, 2]

    asyncio.run(body())


def test_a_container_left_frozen_by_a_signal_to_all_runs_on(fresh: RunningAgent, rootfs: str) -> None:
    target = at(fresh, rootfs)

    async def body() -> None:
        async with await connect(target) as client, running(target, client) as init:
            for file, text in (("freezer.state", "FROZEN"), ("cgroup.freeze", "1")):
                paths = [Path(path, file) for path in fresh.cgroups() if path.endswith(init.container)]
                for path in filter(Path.exists, paths):
                    path.write_text(text)
            await asyncio.to_thread(fresh.kill_agent)
            assert (await client.container_state(init.container)).status is Status.RUNNING
            assert (await run(client, init.container, "echo", "runs")).stdout == b"runs\n"

    asyncio.run(body())


async def out_of_memory(bench: Bench, arm: Act) -> None:
    target = bench.target
    async with running(target, bench.client, spec=limited) as init:
        await arm()
        async with executing(bench.client, init.container, *HUNGRY) as hog:
            record = await hog.wait()
        assert (record.exit_code, record.reason) == (137, Reason.OOM)
        [told] = await _events(target, init.container, "container.oom")
        assert record.oom == from_wire(Oom, told.data)


async def _kill(client: Client, container: str, number: str, *, everyone: bool = False) -> None:
    """A signal that was sent right before the agent died is not sent again to what it has ended."""
    try:
        await client.kill_container(container, number, everyone=everyone)
    except RpcError as error:
        if error.code is not Code.FAILED_PRECONDITION:
            raise


async def signal_all(bench: Bench, arm: Act) -> None:
    trap = "trap 'exit 5' TERM; echo ready; while :; do sleep 0.01; done"
    async with running(bench.target, bench.client, "bash", "-c", trap, stdio=OUTPUT) as init:
        await expect(init.streams["stdout"], b"ready\n")
        await arm()
        await _kill(bench.client, init.container, "TERM", everyone=True)
        assert (await bench.client.wait_container(init.container)).exit_code == 5


async def end_with_init(bench: Bench, arm: Act) -> None:
    command = f"python3 -I -S -c '{BOMB}' & exec sleep 100000"
    async with running(bench.target, bench.client, "sh", "-c", command, stdio=OUTPUT, spec=shared) as init:
        await expect(init.streams["stdout"], b"ready\n")
        await arm()
        await _kill(bench.client, init.container, "KILL")
        assert (await bench.client.wait_container(init.container)).signal == 9
        await none_left(bench.client, init.container)
        assert len(await _events(bench.target, init.container, "container.stopped")) == 1


@pytest.mark.timeout(240)
@pytest.mark.parametrize("attempt", [out_of_memory, signal_all, end_with_init])
def test_killed_at_each_step(mortal: RunningAgent, rootfs: str, attempt: object) -> None:
    walk(mortal, rootfs, attempt)  # type: ignore[arg-type]
