"""auto_delete and output that nobody comes for: it is kept for a while, and then it is not."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Iterator

import pytest

from protocol.types import Stdio, StreamMode, StreamSpec
from tests.cases.agents import REPO, RunningAgent, stopped_clean
from tests.cases.target import STREAM, Target, connect, created, event, terminal

IMPATIENT = f"{REPO / 'tests' / 'fakes' / 'impatient'}{os.pathsep}{REPO}"
OWED = 1.0
"""Three times as long as that agent keeps what nobody comes for."""

FILLS = """
import os, select
os.set_blocking(1, False)
while select.select([], [1], [], 0.5)[1]:
    os.write(1, bytes(4096))
"""
"""Writes as much as goes without anybody reading, and ends."""


@pytest.fixture(scope="module")
def own() -> Iterator[RunningAgent]:
    yield from stopped_clean(RunningAgent(python_path=IMPATIENT))


@pytest.fixture
def target(own: RunningAgent, rootfs: str) -> Target:
    return Target(own.address, rootfs, box="box", pace=1.0, execs=1)


def play(own: RunningAgent, body: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await body()

    before = own.holdings()
    asyncio.run(bounded())
    own.assert_holds(before)


@pytest.mark.parametrize("stdio", [Stdio(stdout=STREAM), terminal()], ids=["pipe", "terminal"])
@pytest.mark.parametrize("kill", [False, True], ids=["", "killed"])
def test_what_nobody_comes_for_is_dropped(
    own: RunningAgent, target: Target, stdio: Stdio, kill: bool
) -> None:
    async def body() -> None:
        async with (
            await connect(target) as client,
            await client.events() as events,
            created(
                target, client, "echo", "unclaimed", stdio=stdio, auto_delete=True, attached=False
            ) as init,
        ):
            await init.start()
            await event(events, "process.exited", init.container)
            if kill:
                os.kill(own.agent_pid, signal.SIGKILL)
            await event(events, "container.deleted", init.container)

    play(own, body)


def test_what_is_being_taken_is_not(own: RunningAgent, target: Target) -> None:
    async def body() -> None:
        stdio = Stdio(stdout=STREAM)
        async with (
            await connect(target) as client,
            await client.events() as events,
            created(target, client, "python3", "-c", FILLS, stdio=stdio, auto_delete=True) as init,
        ):
            await init.start()
            await event(events, "process.exited", init.container)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(OWED):
                    await event(events, "container.deleted", init.container)
            assert (await client.container_state(init.container)).status.value == "stopped"

    play(own, body)


def test_a_blocking_spool_is_owed_for_good(own: RunningAgent, target: Target) -> None:
    async def body() -> None:
        stdio = Stdio(stdout=StreamSpec(StreamMode.SPOOL))
        async with (
            await connect(target) as client,
            await client.events() as events,
            created(target, client, "echo", "owed", stdio=stdio, auto_delete=True, attached=False) as init,
        ):
            await init.start()
            await event(events, "stream.end", init.container)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(OWED):
                    await event(events, "container.deleted", init.container)

    play(own, body)
