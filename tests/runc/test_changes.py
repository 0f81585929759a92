"""The agent is killed while the runtime is at work on a pause, a resume or an update, which goes on."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import AsyncIterator

from gcsagent.host.client import Client
from protocol.errors import Code, RpcError
from protocol.families.container import ContainerRef, StateContainer
from protocol.types import Status
from tests.cases.agents import frozen
from tests.cases.target import connect, creation, name, refused, remove
from tests.fakes.slow_runc import Slow


@contextlib.asynccontextmanager
async def _container(slow: Slow) -> AsyncIterator[tuple[Client, str]]:
    async with await connect(slow.target) as client, asyncio.timeout(40):
        params = creation(slow.target, name("c"), ("sleep", "100000"))
        await client.create_container(params)
        try:
            await client.start_container(params.container)
            yield client, params.container
        finally:
            await remove(client, params.container)


async def _not_yet(client: Client, call: asyncio.Future[None]) -> None:
    """The agent has had the chance to answer: it has answered what was sent behind it."""
    await client.ping()
    assert not call.done()


async def _pid(client: Client, container: str) -> int:
    return (await client.container_state(container)).pid


def test_a_resume_waits_for_the_pause_that_is_under_way(slow: Slow) -> None:
    async def body() -> None:
        async with _container(slow) as (client, box):
            (slow.directory / "slow").write_text("pause")
            pausing = asyncio.ensure_future(client.pause_container(box))
            async with slow.killed_during():
                resuming = asyncio.ensure_future(client.resume_container(box))
                await _not_yet(client, resuming)
            await asyncio.gather(pausing, resuming)
            assert (await client.container_state(box)).status is Status.RUNNING
            assert not frozen(await _pid(client, box))

    asyncio.run(body())


def test_a_pause_that_fails_after_the_agent_is_made_for_real(slow: Slow) -> None:
    """Whoever asked asks again by itself, and what it is told is true."""

    async def body() -> None:
        async with _container(slow) as (client, box):
            (slow.directory / "slow").write_text("pause")
            pausing = asyncio.ensure_future(client.pause_container(box))
            async with slow.killed_during(fail=True):
                await _not_yet(client, pausing)
            await pausing
            assert (await client.container_state(box)).status is Status.PAUSED
            assert frozen(await _pid(client, box))
            await client.resume_container(box)
            assert not frozen(await _pid(client, box))

    asyncio.run(body())


def test_a_pause_waits_for_the_resume_that_is_under_way(slow: Slow) -> None:
    async def body() -> None:
        async with _container(slow) as (client, box):
            await client.pause_container(box)
            (slow.directory / "slow").write_text("resume")
            resuming = asyncio.ensure_future(client.resume_container(box))
            async with slow.killed_during():
                with refused(Code.DEADLINE_EXCEEDED):
                    await client.call("container.pause", ContainerRef(box), deadline=0.2)
            await resuming
            await client.pause_container(box)
            assert frozen(await _pid(client, box))
            await client.resume_container(box)

    asyncio.run(body())


def test_an_update_that_is_under_way_does_not_win_over_a_later_one(slow: Slow) -> None:
    async def body() -> None:
        async with _container(slow) as (client, box):
            (slow.directory / "slow").write_text("update")
            first = asyncio.ensure_future(client.update_container(box, pids=70))
            async with slow.killed_during():
                second = asyncio.ensure_future(client.update_container(box, pids=80))
                await _not_yet(client, second)
            await asyncio.gather(first, second)
            assert (await client.container_stats(box)).pids.limit == 80

    asyncio.run(body())


def test_an_update_that_fails_after_the_agent_leaves_nothing_behind(slow: Slow) -> None:
    """Its first caller has gone meanwhile: nobody asks again."""

    async def body() -> None:
        async with _container(slow) as (client, box):
            await client.update_container(box, pids=60)
            (slow.directory / "slow").write_text("update")
            async with await connect(slow.target) as other:
                leaving = asyncio.ensure_future(other.update_container(box, pids=70, cpus=0.5))
                async with slow.killed_during(fail=True):
                    leaving.cancel()
                    with contextlib.suppress(asyncio.CancelledError, RpcError):
                        await leaving
            await client.update_container(box, memory_bytes=64 << 20)  # behind it
            found = await client.container_stats(box)
            assert (found.pids.limit, found.cpu.limit, found.memory.limit) == (60, None, 64 << 20)

    asyncio.run(body())


async def _run(*argv: str) -> None:
    await asyncio.to_thread(subprocess.run, argv, check=True, timeout=20)


def test_what_was_done_behind_the_agents_back_is_a_difference(slow: Slow) -> None:
    runc = ["runc", "--root", str(slow.running.state_dir / "runtime" / "runc")]

    async def body() -> None:
        async with _container(slow) as (client, box):
            await _run(*runc, "pause", box)
            state = await client.container_state(box, ask_runtime=True)
            assert (state.status, state.runtime_view and state.runtime_view.status) == (
                Status.RUNNING,
                "paused",
            )
            assert state.runtime_view is not None
            assert state.runtime_view.differences == ("the agent has it as running, the runtime as paused",)
            await _run(*runc, "resume", box)
            await _run(*runc, "delete", "--force", box)
            await client.wait_container(box)
            state = await client.container_state(box, ask_runtime=True)
            assert state.runtime_view is not None
            assert "does not exist" in state.runtime_view.problem
            [difference] = state.runtime_view.differences
            assert difference.startswith("the agent has it as stopped, the runtime does not know it")

    asyncio.run(body())


def test_a_runtime_that_cannot_be_asked_hides_nothing(slow: Slow) -> None:
    """It hangs at the gate, and then it is not there at all."""

    async def body() -> None:
        async with _container(slow) as (client, box):
            (slow.directory / "slow").write_text("state")
            params = StateContainer(box, ask_runtime=True)
            state = await client.call("container.state", params, deadline=2.0)
            assert (state.status, state.runtime_view.differences) == (Status.RUNNING, ())
            assert "deadline" in state.runtime_view.problem
            (slow.directory / "slow").write_text("nothing")
            (slow.directory / "runc").rename(slow.directory / "away")
            try:
                state = await client.container_state(box, ask_runtime=True)
            finally:
                (slow.directory / "away").rename(slow.directory / "runc")
            assert state.runtime_view is not None
            assert (state.status, state.runtime_view.differences) == (Status.RUNNING, ())
            assert "cannot be started" in state.runtime_view.problem

    asyncio.run(body())
