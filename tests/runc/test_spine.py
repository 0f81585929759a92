"""Every case over a UNIX socket with the real runc and crun, and after each: nothing left, nothing held."""

from __future__ import annotations

import asyncio

import pytest

from tests.cases.agents import RunningAgent
from tests.cases.spine import NAMES, check, close_box, open_box
from tests.cases.target import Target

SECONDS = 20.0


async def _run(target: Target, name: str) -> None:
    await open_box(target)
    try:
        await check(target, name, SECONDS)
    finally:
        await close_box(target)


@pytest.mark.parametrize("name", NAMES)
def test_case(agent: RunningAgent, rootfs: str, name: str) -> None:
    _hold(agent, Target(agent.address, rootfs, box="box", pace=1.0, execs=30), name)


@pytest.mark.parametrize("name", NAMES)
def test_case_with_crun(crun_agent: RunningAgent, rootfs: str, name: str) -> None:
    _hold(crun_agent, Target(crun_agent.address, rootfs, box="box", pace=1.0, execs=30, runtime="crun"), name)


def _hold(agent: RunningAgent, target: Target, name: str) -> None:
    before = agent.holdings()
    asyncio.run(_run(target, name))
    agent.assert_holds(before)
