"""Many execs and containers, good and bad, on an agent of their own: nothing may be left of any."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterator

import pytest

from gcsagent.host.client import Client
from protocol.errors import RpcError
from protocol.families.process import Exec
from tests.cases.agents import RunningAgent, stopped_clean
from tests.cases.spine import close_box, open_box
from tests.cases.target import (
    OUTPUT,
    PIPES,
    Target,
    connect,
    creation,
    executing,
    expect,
    name,
    run,
    running,
    terminal,
)

pytestmark = pytest.mark.timeout(180)
SECONDS = 150.0
AT_ONCE = 4
GROWTH_KIB = 4096
"""What either process may grow by: allocators keep pages, a leak of one exec record is a few KiB."""

Work = Callable[[Client, int], Coroutine[None, None, None]]


@pytest.fixture(scope="module")
def quiet_agent() -> Iterator[RunningAgent]:
    """Not the one of the other tests: they are not to move its counts. Its log is short, too."""
    yield from stopped_clean(RunningAgent("--log-level", "warning"))


@pytest.fixture(scope="module")
def quiet_agent_with_crun() -> Iterator[RunningAgent]:
    yield from stopped_clean(RunningAgent("--log-level", "warning", runtime="crun"))


@pytest.fixture
def target(quiet_agent: RunningAgent, rootfs: str) -> Iterator[Target]:
    yield from _with_box(quiet_agent, rootfs)


@pytest.fixture
def crun_target(quiet_agent_with_crun: RunningAgent, rootfs: str) -> Iterator[Target]:
    yield from _with_box(quiet_agent_with_crun, rootfs)


def _with_box(agent: RunningAgent, rootfs: str) -> Iterator[Target]:
    target = Target(agent.address, rootfs, box="box", pace=1.0, execs=AT_ONCE)
    asyncio.run(open_box(target))
    yield target
    asyncio.run(close_box(target))


def repeat(agent: RunningAgent, target: Target, count: int, work: Work) -> None:
    """Counts, warms up, weighs, works, counts and weighs again."""

    async def several(numbers: range) -> None:
        async with asyncio.timeout(SECONDS), await connect(target) as client:
            pending = iter(numbers)

            async def worker() -> None:
                for number in pending:
                    await work(client, number)

            async with asyncio.TaskGroup() as tasks:
                for _ in range(AT_ONCE):
                    tasks.create_task(worker())

    held = agent.holdings()
    asyncio.run(several(range(count // 5)))
    memory = agent.memory_kib()
    asyncio.run(several(range(count)))
    agent.assert_holds(held)
    grown = [after - before for before, after in zip(memory, agent.memory_kib(), strict=True)]
    assert max(grown) < GROWTH_KIB, f"supervisor and agent grew by {grown} KiB"


def test_three_hundred_execs(quiet_agent: RunningAgent, target: Target) -> None:
    async def work(client: Client, number: int) -> None:
        if number % 3 == 2:
            done = await run(client, target.box, "cat", data=b"some", stdio=PIPES)
            assert (done.stdout, done.exit.exit_code) == (b"some", 0)
        else:
            stdio = terminal() if number % 3 else OUTPUT
            done = await run(client, target.box, "sh", "-c", f"echo x; exit {number % 7}", stdio=stdio)
            assert (done.stdout.strip(), done.exit.exit_code) == (b"x", number % 7)

    repeat(quiet_agent, target, 300, work)


def test_fifty_execs_that_fail(quiet_agent: RunningAgent, target: Target) -> None:
    """A missing program, a bad directory, a deadline anywhere between start and end, a cancel likewise."""

    async def work(client: Client, number: int) -> None:
        missing = number % 5 == 0
        spec = {
            "args": ["no-such-program" if missing else "true"],
            "cwd": "/none" if number % 5 == 1 else "/",
        }
        stdio = (OUTPUT, PIPES, terminal())[number % 3]
        params = Exec(target.box, name("p"), spec, stdio)
        if number % 5 < 2:
            with pytest.raises(RpcError):
                await client.exec_process(params)
            return
        soon = 0.001 + number % 7 * 0.01
        with contextlib.suppress(RpcError, TimeoutError):
            if number % 5 == 4:
                async with asyncio.timeout(soon):
                    await client.exec_process(params)
            else:
                await client.exec_process(params, deadline=soon)
        await forget_whatever_became_of_it(client, params)

    repeat(quiet_agent, target, 50, work)


PIPE_FOR_PASSWD = """
rm /etc/passwd; mkfifo /etc/passwd
echo ready
exec 3>/etc/passwd
echo asked
exec sleep 100000
"""


def test_an_exec_that_the_workload_keeps_waiting_while_its_container_goes(
    quiet_agent: RunningAgent, target: Target
) -> None:
    """The runtime reads the container's /etc/passwd, and is over that when both are killed."""

    async def scene() -> None:
        async with (
            asyncio.timeout(SECONDS),
            await connect(target) as client,
            running(target, client) as init,
            executing(client, init.container, "sh", "-c", PIPE_FOR_PASSWD) as shell,
        ):
            await expect(shell.streams["stdout"], b"ready\n")
            waiting = asyncio.create_task(run(client, init.container, "true"))
            await expect(shell.streams["stdout"], b"asked\n")
            await client.delete_container(init.container, force=True)
            with contextlib.suppress(RpcError):
                await waiting

    held = quiet_agent.holdings()
    asyncio.run(scene())
    quiet_agent.assert_holds(held)


async def forget_whatever_became_of_it(client: Client, params: Exec) -> None:
    """A deadline or cancel may come after the commit point: then it ran, and has a record to delete."""
    with contextlib.suppress(RpcError):
        await client.wait_process(params.container, params.process)
    with contextlib.suppress(RpcError):
        await client.delete_process(params.container, params.process)


def test_thirty_containers(quiet_agent: RunningAgent, target: Target) -> None:
    async def work(client: Client, number: int) -> None:
        args = ("true",) if number % 3 else ("sleep", "100000")
        stdio = terminal() if number % 2 else PIPES
        async with running(target, client, *args, stdio=stdio, overlay=number % 5 > 0) as init:
            if number % 3:
                assert (await init.wait()).exit_code == 0

    repeat(quiet_agent, target, 30, work)


def test_creates_cut_off_anywhere(quiet_agent: RunningAgent, target: Target) -> None:
    cut_off_creates(quiet_agent, target, 0.16)


def test_creates_cut_off_anywhere_with_crun(quiet_agent_with_crun: RunningAgent, crun_target: Target) -> None:
    cut_off_creates(quiet_agent_with_crun, crun_target, 0.04)


def cut_off_creates(agent: RunningAgent, target: Target, longest: float) -> None:
    """Wherever the deadline falls, up to ``longest`` seconds: before, in, or after the runtime."""

    async def work(client: Client, number: int) -> None:
        params = creation(target, name("c"), ("true",), stdio=(PIPES, terminal())[number % 2])
        try:
            await client.create_container(params, deadline=longest * (10 + number * 37 % 120) / 130)
        except RpcError:
            return
        await client.delete_container(params.container)

    repeat(agent, target, 120, work)
