"""Many containers and processes alive at once, and how the agent answers meanwhile. Figures are printed."""

from __future__ import annotations

import asyncio
import contextlib
import math
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass

from gcsagent.host.client import Client
from protocol.families.process import Exec
from tests.cases.target import OUTPUT, Target, creation, executing, remove, running

AT_ONCE = 4
"""Requests in flight while things are made: more would measure the queue for two CPUs."""


@dataclass(frozen=True, slots=True)
class Size:
    """``rounds`` is how often each operation is measured."""

    containers: int
    execs: int
    rounds: int


@dataclass(frozen=True, slots=True)
class Figures:
    """Seconds that an operation took, each time."""

    what: str
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def worst(self) -> float:
        return max(self.seconds)

    def __str__(self) -> str:
        ordered = sorted(self.seconds)
        high = ordered[math.ceil(0.95 * len(ordered)) - 1]
        shown = (f"{1000 * value:8.1f}" for value in (self.median, high, self.worst))
        return f"  {self.what:34}" + " ".join(shown)


HEAD = f"  {'milliseconds':34}{'median':>8} {'95 %':>8} {'worst':>8}"


async def measure(what: str, rounds: int, operation: Callable[[], Awaitable[object]]) -> Figures:
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        await operation()
        seconds.append(time.perf_counter() - began)
    return Figures(what, tuple(seconds))


async def all_of(work: Iterable[Awaitable[object]]) -> None:
    """AT_ONCE of them at a time."""
    pending = iter(work)

    async def worker() -> None:
        for each in pending:
            await each

    async with asyncio.TaskGroup() as tasks:
        for _ in range(AT_ONCE):
            tasks.create_task(worker())


async def crowd(target: Target, client: Client, containers: Iterable[str]) -> None:
    """Starts them, each with two pipes that nobody reads."""

    async def start(container: str) -> None:
        params = creation(target, container, ("sleep", "100000"), stdio=OUTPUT, overlay=False)
        await client.create_container(params)
        await client.start_container(container)

    await all_of(start(container) for container in containers)


async def populate(client: Client, containers: list[str], execs: int, first: int = 0) -> None:
    """Starts ``execs`` processes, spread over the containers and numbered from ``first`` on."""
    spec = {"args": ["sleep", "100000"], "cwd": "/"}
    await all_of(
        client.exec_process(Exec(containers[number % len(containers)], f"e{number}", spec, OUTPUT))
        for number in range(first, first + execs)
    )


async def disperse(client: Client, containers: Iterable[str]) -> None:
    await all_of(remove(client, container) for container in containers)


@contextlib.asynccontextmanager
async def saturated(
    target: Target, client: Client, container: str
) -> AsyncIterator[Callable[[], Awaitable[int]]]:
    """A stream that another process reads as fast as it comes; the function counts its bytes."""
    command = (sys.executable, "-m", "gcsagent.host", "--address", target.address)
    reader = await asyncio.create_subprocess_exec(
        *command, "exec", container, "--", "cat", "/dev/zero", stdout=asyncio.subprocess.DEVNULL
    )

    async def count() -> int:
        state = await client.container_state(container)
        return sum(each.streams["stdout"].bytes for each in state.processes if each.args[0] == "cat")

    try:
        while not await count():
            assert reader.returncode is None
        yield count
    finally:
        reader.terminate()
        await reader.wait()


async def responses(target: Target, client: Client, crowd: list[str], rounds: int) -> list[Figures]:
    """How long requests take, one after the other, and the agent's own word for how late its loop is."""
    lags = []

    async def ping() -> None:
        lags.append((await client.ping()).loop_lag_us / 1e6)

    async def ping_beside_a_list() -> None:
        listing = asyncio.ensure_future(client.list_containers())
        while not listing.done():
            await ping()
        assert len(await listing) >= len(crowd)

    async def kill_and_wait() -> None:
        async with executing(client, crowd[0], "sleep", "100000", attached=False) as process:
            began.append(time.perf_counter())
            await client.kill_process(process.container, process.process, "KILL")
            assert (await client.wait_process(process.container, process.process)).signal == 9
            ended.append(time.perf_counter())

    async def run() -> None:
        async with executing(client, crowd[0], "true", attached=False) as process:
            assert (await process.wait()).exit_code == 0

    async def live() -> None:
        async with running(target, client, attached=False, overlay=False):
            pass

    began: list[float] = []
    ended: list[float] = []
    figures = [
        await measure("ping", 5 * rounds, ping),
        await measure("container.state", 5 * rounds, lambda: client.container_state(crowd[-1])),
        await measure("container.stats", 5 * rounds, lambda: client.container_stats(crowd[-1])),
        await measure("container.list, summary", rounds, lambda: client.list_containers(processes=False)),
        await measure("container.list, with processes", rounds, client.list_containers),
        await measure("container.kill", rounds, lambda: client.kill_container(crowd[-1], "CONT")),
        await measure("exec true, wait, delete", rounds, run),
        await measure("create, start, delete", rounds, live),
    ]
    await measure("", rounds, kill_and_wait)
    waits = tuple(after - before for before, after in zip(began, ended, strict=True))
    lags.clear()
    beside = await measure("", rounds, ping_beside_a_list)
    del beside
    return [*figures, Figures("kill, wait's answer", waits), Figures("loop's lag while listing", tuple(lags))]


def show(title: str, figures: Iterable[Figures]) -> None:
    print(f"\n{title}\n{HEAD}")
    for each in figures:
        print(each)
