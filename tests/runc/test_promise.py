"""SIGKILL the agent, any number of times: no byte, exit status or answer is lost, and nothing is left.

``make chaos`` is the same at full length: ``GCS_CHAOS=long``.
"""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from tests.cases.agents import RunningAgent, greeted, stopped_clean
from tests.cases.chaos import Storm, weather_the_storm
from tests.cases.spine import close_box, open_box
from tests.cases.target import MIB, Target

SHORT = Storm(kills=25, stdout=128 * MIB, stdin=48 * MIB, tty=2 * MIB, spool=32 * MIB, execs=20)
BRIEF = Storm(kills=8, stdout=32 * MIB, stdin=8 * MIB, tty=1 * MIB, spool=8 * MIB, execs=8)
LONG = Storm(kills=220, stdout=1024 * MIB, stdin=200 * MIB, tty=16 * MIB, spool=200 * MIB, execs=150)


def _generation(agent: RunningAgent) -> int:
    with greeted(agent.socket_path, 30.0) as generation:
        return generation


async def _storm(target: Target, storm: Storm, agent: RunningAgent) -> None:
    async def kill() -> None:
        generation = await asyncio.to_thread(_generation, agent)
        os.kill(agent.agent_pid, signal.SIGKILL)
        await asyncio.to_thread(agent.wait_for_generation, generation + 1)

    await open_box(target)
    try:
        weather = await weather_the_storm(target, storm, kill)
        assert weather.kills == storm.kills
    finally:
        await close_box(target)


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("runtime, short", [("runc", SHORT), ("crun", BRIEF)])
def test_everything_goes_on_while_the_agent_is_killed(rootfs: str, runtime: str, short: Storm) -> None:
    storm = LONG if (os.environ.get("GCS_CHAOS"), runtime) == ("long", "runc") else short
    for agent in stopped_clean(RunningAgent("--log-level", "info", runtime=runtime)):
        before = agent.holdings()
        target = Target(agent.address, rootfs, box="box", pace=3.0, execs=1)
        asyncio.run(_storm(target, storm, agent))
        agent.assert_holds(before)
        print(
            f"\nchaos, {runtime}: {storm.kills} kills of the agent; {storm.stdout >> 20} MiB of stdout,"
            f" {storm.stdin >> 20} MiB of stdin, {storm.tty >> 20} MiB through a raw terminal and back,"
            f" {storm.spool >> 20} MiB through a spool of 1 MiB,"
            f" {storm.execs} execs: every byte once and in order, every exit code right, nothing left"
        )
