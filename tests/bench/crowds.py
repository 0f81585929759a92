"""What many containers and processes cost while they do nothing, and what they add to an exec.

Each figure has an agent of its own, without the watchdog, whose words are what an idle agent wakes up for.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import statistics
from collections.abc import AsyncIterator
from pathlib import Path

from tests.bench.execs import one
from tests.bench.figures import Measured, at_most, figure, in_turn
from tests.bench.host import BOX, Host, bare, running_agent
from tests.cases.scale import crowd, disperse, populate
from tests.cases.target import Target, connect

WARM_UP, CONTAINERS, EXECS = 20, 100, 200
FEW, MANY = 10, 1000
QUIET_SECONDS = 30.0


@contextlib.asynccontextmanager
async def another(host: Host) -> AsyncIterator[Host]:
    async with running_agent("--watchdog", "off") as agent:
        target = Target(agent.address, host.target.rootfs, box=BOX, pace=5.0, execs=1)
        async with await connect(target) as client:
            runc = ("runc", "--root", str(agent.state_dir / "runtime" / "runc"))
            yield dataclasses.replace(host, agent=agent, target=target, client=client, runc=runc)
            await disperse(client, [each.container for each in await client.list_containers(processes=False)])


def names(count: int) -> list[str]:
    return [BOX, *(f"c{number:03}" for number in range(1, count))]


def _both(host: Host) -> float:
    return float(sum(host.agent.memory_kib()))


@figure(
    "idle-container",
    tier="host",
    what="agent and supervisor memory for each idle container",
    target=at_most(24),
    unit="KiB",
    samples=1,
)
async def idle_container(host: Host, _samples: int) -> Measured:
    """The first ones are not counted: the allocators' first pages are nobody's."""
    async with another(host) as fresh:
        every = names(CONTAINERS)
        await crowd(fresh.target, fresh.client, every[:WARM_UP])
        before = _both(fresh)
        await crowd(fresh.target, fresh.client, every[WARM_UP:])
        return Measured([(_both(fresh) - before) / (CONTAINERS - WARM_UP)])


@figure(
    "idle-exec",
    tier="host",
    what="likewise for each idle exec",
    target=at_most(12),
    unit="KiB",
    samples=1,
)
async def idle_exec(host: Host, _samples: int) -> Measured:
    async with another(host) as fresh:
        every = names(WARM_UP)
        await crowd(fresh.target, fresh.client, every)
        await populate(fresh.client, every, WARM_UP)
        before = _both(fresh)
        await populate(fresh.client, every, EXECS, first=WARM_UP)
        return Measured([(_both(fresh) - before) / EXECS])


@figure(
    "wake-ups",
    tier="host",
    what="wake-ups of agent and supervisor in 30 s with 100 idle containers, watchdog apart",
    target=at_most(0),
    unit="",
    samples=1,
)
async def wake_ups(host: Host, _samples: int) -> Measured:
    async with another(host) as fresh:
        await crowd(fresh.target, fresh.client, names(CONTAINERS))
        await settled(fresh)
        before = switches(fresh)
        await asyncio.sleep(QUIET_SECONDS)
        return Measured([float(switches(fresh) - before)])


async def settled(host: Host) -> None:
    """What is done behind the last answers is through: two looks, a ping between, find nothing new."""
    await host.client.ping()
    seen = -1
    while seen != (now := switches(host)):
        seen = now
        await asyncio.sleep(0.2)


def switches(host: Host) -> int:
    """How often agent and supervisor have waited for something so far."""
    return sum(_switches(pid) for pid in (host.agent.pid, host.agent.agent_pid))


def _switches(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))


@figure(
    "growth",
    tier="host",
    what="growth of exec's cost from 10 to 1,000 live processes",
    baseline="that of `runc exec`",
    target=at_most(1.10),
    unit="x",
    samples=25,
)
async def growth(host: Host, samples: int) -> Measured:
    """How many times runc's cost ours is with many, over how many times with few: each a median of pairs."""
    async with another(host) as fresh:
        every = names(FEW)
        await crowd(fresh.target, fresh.client, every)
        few = await _pairs(fresh, samples)
        await populate(fresh.client, every, MANY - FEW)
        many = await _pairs(fresh, samples)
    ratios = [statistics.median(pairs.values) for pairs in (many, few)]
    note = f"{len(many.ours)} pairs at 1,000 live processes, {len(few.ours)} at 10; shown is each beside runc"
    return Measured(ratios[:1], ratios[1:], [note])


async def _pairs(host: Host, samples: int) -> Measured:
    command = host.bare_exec("true")

    async def theirs() -> float:
        return bare(command)

    return await in_turn(samples, lambda: one(host.client), theirs)
