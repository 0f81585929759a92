"""Two hundred containers and a thousand processes alive at once: what they cost, and who is held up by them.

``make test-long`` is that; without ``GCS_SCALE=long`` it is a tenth. Figures are printed, compared with what
runc itself takes for the same, and asserted only where another order of magnitude would be a fault.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from gcsagent.host.client import Client
from tests.cases.agents import RunningAgent, stopped_clean
from tests.cases.scale import Figures, Size, crowd, disperse, measure, populate, responses, saturated, show
from tests.cases.target import MIB, Target, connect, creation, executing, running

SHORT, LONG = Size(20, 100, 5), Size(200, 1000, 20)
SIZE = LONG if os.environ.get("GCS_SCALE") == "long" else SHORT
WARM_UP = 10
"""Containers before memory is measured: the allocators' first pages are nobody's."""

CONTAINER_KIB = 64
"""What an idle container may cost the agent; a tenth of it is what it does."""

ANSWER_SECONDS = 1.0
"""What an answer may take that no runtime is asked for, on a machine that does other things as well."""


Pair = tuple[Figures, Figures]


@pytest.fixture
def agent() -> Iterator[RunningAgent]:
    """Without the watchdog, whose words are what an idle agent wakes up for."""
    yield from stopped_clean(RunningAgent("--log-level", "warning", "--watchdog", "off"))


@pytest.mark.timeout(900)
def test_a_crowd(agent: RunningAgent, rootfs: str, tmp_path: Path) -> None:
    before = agent.holdings()
    target = Target(agent.address, rootfs, box="", pace=5.0, execs=1)
    asyncio.run(_crowd(agent, target, Bare(target, tmp_path)))
    agent.assert_holds(before)


async def _crowd(agent: RunningAgent, target: Target, bare: Bare) -> None:
    containers = [f"c{number:03}" for number in range(SIZE.containers)]
    async with await connect(target) as client:
        await crowd(target, client, containers[:WARM_UP])
        alone = await compare(client, target, bare, agent)
        memory = agent.memory_kib()
        await crowd(target, client, containers[WARM_UP:])
        each = [
            (now - then) / (SIZE.containers - WARM_UP)
            for then, now in zip(memory, agent.memory_kib(), strict=True)
        ]
        memory = agent.memory_kib()
        await populate(client, containers, SIZE.execs)
        every = [(now - then) / SIZE.execs for then, now in zip(memory, agent.memory_kib(), strict=True)]
        print(
            f"\n{SIZE.containers} containers, {SIZE.execs} execs; agent and supervisor grew by"
            f" {each[1]:.1f} and {each[0]:.1f} KiB a container, {every[1]:.1f} and {every[0]:.1f} KiB an exec"
        )
        assert max(*each, *every) < CONTAINER_KIB
        listed = await client.list_containers()
        assert sum(len(container.processes) for container in listed) == SIZE.containers + SIZE.execs

        among = await compare(client, target, bare, agent)
        show_ratios(alone, among)
        async with saturated(target, client, containers[1]) as count:
            began, moved = asyncio.get_running_loop().time(), await count()
            figures = await responses(target, client, containers, SIZE.rounds)
            seconds = asyncio.get_running_loop().time() - began
            rate = (await count() - moved) / MIB / seconds
        show(f"while a stream moves {rate:.0f} MiB/s", figures)
        assert rate > 1
        for quick in (*figures[:4], figures[5], *figures[-2:]):
            assert quick.worst < ANSWER_SECONDS, quick
        await disperse(client, containers)


class Bare:
    """runc itself, called as the agent has it called, by nobody but us."""

    def __init__(self, target: Target, directory: Path) -> None:
        self._runc = ["runc", "--root", str(directory / "root")]
        self._bundle = directory
        spec = creation(target, "bare", ("sleep", "100000"), overlay=False).spec
        assert spec is not None
        spec["linux"]["cgroupsPath"] = f"/gcs-bare-{os.getpid()}"
        (directory / "config.json").write_text(json.dumps(spec))

    def call(self, *words: str) -> None:
        null = subprocess.DEVNULL
        subprocess.run([*self._runc, *words], check=True, timeout=60, stdin=null, stdout=null, stderr=null)

    def start(self) -> None:
        self.call("create", "--bundle", str(self._bundle), "bare")
        self.call("start", "bare")

    def delete(self) -> None:
        self.call("delete", "--force", "bare")

    def live(self) -> None:
        self.start()
        self.delete()

    def execute(self) -> None:
        self.call("exec", "bare", "true")


async def compare(client: Client, target: Target, bare: Bare, agent: RunningAgent) -> list[Pair]:
    """The agent's and runc's figures for the same. Left alone, the agent must not wake up."""
    box = (await client.list_containers(processes=False))[0].container

    async def execute() -> None:
        async with executing(client, box, "true", attached=False) as process:
            await process.wait()

    async def live() -> None:
        async with running(target, client, attached=False, overlay=False):
            pass

    pairs = [await _in_turn("create, start, delete", live, bare.live)]
    await asyncio.to_thread(bare.start)
    pairs.append(await _in_turn("exec true, wait, delete", execute, bare.execute))
    await asyncio.to_thread(bare.execute)  # by its end, what the agent had to do behind its answers is done
    before = wake_ups(agent)
    await measure("", SIZE.rounds, lambda: asyncio.to_thread(bare.execute))
    assert wake_ups(agent) == before, "an idle agent or supervisor woke up"
    await asyncio.to_thread(bare.delete)
    return pairs


async def _in_turn(what: str, ours: Callable[[], Awaitable[None]], theirs: Callable[[], None]) -> Pair:
    """In turn, so that whatever else the machine does falls on both."""
    figures: tuple[list[float], list[float]] = ([], [])
    for _ in range(SIZE.rounds):
        figures[0].extend((await measure("", 1, ours)).seconds)
        figures[1].extend((await measure("", 1, lambda: asyncio.to_thread(theirs))).seconds)
    return Figures(what, tuple(figures[0])), Figures(what, tuple(figures[1]))


def show_ratios(alone: list[Pair], among: list[Pair]) -> None:
    print(f"{'':28}{f'beside {WARM_UP} containers':>30}{f'beside {SIZE.containers}, {SIZE.execs} execs':>30}")
    for first, second in zip(alone, among, strict=True):
        cells = (
            f"{1000 * ours.median:.1f} ms, {ours.median / theirs.median:.2f} x runc"
            for ours, theirs in (first, second)
        )
        print(f"  {first[0].what:26}" + "".join(f"{cell:>30}" for cell in cells))


def wake_ups(agent: RunningAgent) -> tuple[int, int]:
    """How often agent and supervisor have waited for something so far."""
    return _switches(agent.agent_pid), _switches(agent.pid)


def _switches(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))
