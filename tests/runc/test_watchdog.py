"""A real agent that is stuck: caught, its stacks in the log, and nobody notices more than a pause."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator

import pytest

from gcsagent.host.client import Client
from tests.cases.agents import RunningAgent, stopped_clean
from tests.cases.target import OUTPUT, Target, creation, expect

SECONDS = 40.0


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
