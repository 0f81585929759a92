"""A real agent that is stuck: caught, its stacks in the log, and nobody notices more than a pause."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import signal
from collections.abc import AsyncIterator, Iterator

import pytest

from gcsagent.host.client import Client
from gcsagent.host.errors import ConnectionLost
from gcsagent.host.metrics import metrics
from gcsagent.host.process import RemoteProcess
from gcsagent.host.spec import exec_spec
from protocol.errors import RpcError
from protocol.families.process import Exec
from tests.cases.agents import RunningAgent, stopped_clean
from tests.cases.target import OUTPUT, PIPES, Target, creation, expect, run
from tests.fakes import pipe_holder

pytestmark = pytest.mark.timeout(180)
SECONDS = 90.0


@pytest.fixture
def watched() -> Iterator[RunningAgent]:
    yield from stopped_clean(RunningAgent("--watchdog", "2"))


def test_a_stopped_agent_is_caught_and_its_container_goes_on(watched: RunningAgent, rootfs: str) -> None:
    target = Target(watched.address, rootfs, box="box", pace=1.0, execs=1)
    script = "echo before; exec sleep 100000"

    async def scene() -> None:
        async with asyncio.timeout(SECONDS), await Client.connect(target.address) as client:
            await client.create_container(creation(target, "box", ("sh", "-c", script), stdio=OUTPUT))
            await client.start_container("box")
            waiting = asyncio.create_task(client.wait_container("box"))
            pid = (await client.container_state("box")).pid
            async with await client.attach("box") as out:
                await expect(out, b"before\n")
            stuck = watched.agent_pid
            os.kill(stuck, signal.SIGSTOP)
            assert (await client.ping()).generation == 2
            assert watched.agent_pid not in (0, stuck)
            state = await client.container_state("box")
            assert (state.status.value, state.pid) == ("running", pid)
            await client.kill_container("box", "SIGKILL")
            assert (await waiting).signal == signal.SIGKILL
            await client.delete_container("box")

    asyncio.run(scene())
    log = watched.log_tail()
    assert "no sign of life for " in log
    assert "Fatal Python error: Aborted" in log
    assert "asyncio/base_events.py" in log
    assert f'"status": {-signal.SIGABRT}' in log


def test_an_idle_agent_is_left_alone(watched: RunningAgent) -> None:
    async def scene() -> None:
        async with asyncio.timeout(SECONDS), await Client.connect(watched.address) as client:
            await asyncio.sleep(5.0)  # more than two deadlines
            assert (await client.ping()).generation == 1

    asyncio.run(scene())


@contextlib.asynccontextmanager
async def holding(
    watched: RunningAgent, rootfs: str, *arguments: str
) -> AsyncIterator[tuple[Client, RemoteProcess]]:
    """Two containers, "box" and "other", and an exec in "box" that has the lock of one of its pipes kept."""
    target = Target(watched.address, rootfs, box="box", pace=1.0, execs=1)
    command = ("python3", "-c", inspect.getsource(pipe_holder), *arguments)
    async with asyncio.timeout(SECONDS), await Client.connect(target.address) as client:
        for ident in ("box", "other"):
            await client.create_container(creation(target, ident, ("sleep", "100000")))
            await client.start_container(ident)
        params = Exec("box", "holder", exec_spec(args=command, terminal=False), PIPES)
        async with await RemoteProcess.exec(client, params) as process:
            await expect(process.streams["stderr"], b"held\n")
            yield client, process
        for ident in ("box", "other"):
            await client.delete_container(ident, force=True)


@pytest.mark.parametrize("by_child", [False, True])
def test_a_pipe_whose_lock_is_kept_keeps_the_agent_for_a_while(
    watched: RunningAgent, rootfs: str, by_child: bool
) -> None:
    """Not even SIGKILL ends the agent then. Who has the pipe pays for it; if need be, the whole container."""
    arguments = ("1", "child") if by_child else ("1",)

    async def scene() -> None:
        async with holding(watched, rootfs, *arguments) as (client, process):
            with contextlib.suppress(RpcError, ConnectionLost):  # it asks how much is in each pipe
                await metrics(client)
            assert (await client.ping()).generation == 2
            assert (await process.wait()).signal == signal.SIGKILL
            assert (await client.container_state("box")).status.value == (
                "stopped" if by_child else "running"
            )
            assert (await client.container_state("other")).status.value == "running"

    asyncio.run(scene())
    assert '"pipes": ["fd/box/holder/stdout"]' in watched.log_tail()


def test_a_pipe_whose_lock_is_kept_does_not_keep_the_supervisor(watched: RunningAgent, rootfs: str) -> None:
    """It closes the last descriptor of a stream's pipe, which waits for the lock, too."""

    async def scene() -> None:
        async with holding(watched, rootfs, "0", "child") as (client, process):
            await client.kill_process("box", "holder", "SIGKILL")
            await process.wait()
            done = await run(client, "other", "echo", "meanwhile")
            assert done.stdout == b"meanwhile\n"
            assert (await client.ping()).generation == 1

    asyncio.run(scene())
