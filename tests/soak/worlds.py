"""Where the load goes: an agent on this machine, or in a VM; how it is looked at there, and killed."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from gcsagent.common.config import GUEST_STATE
from gcsagent.host.client import Client
from gcsagent.host.vm.tools import cache_dir
from tests.bench.vm import GUEST, SEEN
from tests.bench.vm import world as booted
from tests.cases.agents import RunningAgent
from tests.cases.spine import close_box, open_box
from tests.cases.target import Target, connect, executing
from tests.soak import probe

Sample = dict[str, int]


@dataclass(frozen=True, slots=True)
class World:
    """``look`` raises OSError while the agent is replaced; ``kill`` returns when another one answers."""

    target: Target
    look: Callable[[], Awaitable[Sample]]
    kill: Callable[[], Awaitable[None]]
    at_once: int
    """Of the load's works: more, and requests pass their own deadlines."""


@contextlib.asynccontextmanager
async def host(_directory: Path) -> AsyncIterator[World]:
    rootfs = str((cache_dir() / "demo-rootfs" / "current" / "rootfs").resolve(strict=True))
    agent = RunningAgent("--log-level", "warning")
    try:
        target = Target(agent.address, rootfs, box="box", pace=6.0, execs=1)
        await open_box(target)

        async def look() -> Sample:
            cgroups = [path for path in agent.cgroups() if os.path.basename(path).startswith("gcs-")]
            return await asyncio.to_thread(probe.sample, agent.pid, str(agent.state_dir), cgroups)

        async def kill() -> None:
            pid = await asyncio.to_thread(probe.agent_of, agent.pid)
            await _killed(target, lambda: asyncio.to_thread(os.kill, pid, signal.SIGKILL))

        yield World(target, look, kill, at_once=8)
        await close_box(target)
        if await asyncio.to_thread(agent.stop):
            raise AssertionError(f"it did not end in order: {agent.log_tail()}")
        agent.assert_nothing_left()
    finally:
        agent.destroy()


async def _killed(target: Target, kill: Callable[[], Awaitable[object]]) -> None:
    async with await connect(target) as client:
        generation = (await client.ping()).generation
        await kill()
        while (await client.ping()).generation == generation:
            pass  # answered by the one about to die: each question is a round trip, not a spin


STATE, CGROUPS = GUEST_STATE, "/sys/fs/cgroup"


@contextlib.asynccontextmanager
async def vm(directory: Path) -> AsyncIterator[World]:
    """In it a container of its own sees the whole guest: by that it is looked at, and the agent killed."""
    async with booted(directory) as machine:

        async def look() -> Sample:
            source = inspect.getsource(probe)
            said = await _in_the_guest(machine.client, "python3", "-c", source, "1", STATE, CGROUPS)
            found: Sample = json.loads(said)
            return found

        async def kill() -> None:
            pid = (await machine.client.info()).agent_pid
            await _killed(
                machine.target, lambda: _in_the_guest(machine.client, "busybox", "kill", "-9", str(pid))
            )

        yield World(machine.target, look, kill, at_once=3)  # an emulated CPU or two


async def _in_the_guest(client: Client, *args: str) -> str:
    async with executing(client, GUEST, "chroot", SEEN, *args) as process:
        done = await process.communicate()
    if done.exit.exit_code:
        raise OSError(done.stderr.decode(errors="replace")[-400:])
    return done.stdout.decode()
