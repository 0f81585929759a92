"""Cgroups at paths of the caller's: a restarted agent knows them, and nothing of them is left at the end."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from protocol.types import Status
from tests.cases.agents import RunningAgent, eventually, stopped_clean
from tests.cases.target import Target, connect, creation, name, remove, run
from tests.runc.test_reload import at


@pytest.fixture
def fresh() -> Iterator[RunningAgent]:
    yield from stopped_clean(RunningAgent("--log-level", "debug"))


def below(running: RunningAgent, part: str) -> list[str]:
    return [path for path in running.cgroups() if path.endswith(part)]


def test_a_successor_keeps_nested_cgroups_and_removes_strays_beside_them(
    fresh: RunningAgent, rootfs: str
) -> None:
    target = at(fresh, rootfs)
    kept, broken = name("kept"), name("broken")

    async def make(target: Target, ident: str, path: str) -> None:
        def change(spec: dict[str, Any]) -> None:
            spec["linux"]["cgroupsPath"] = path

        async with await connect(target) as client:
            await client.create_container(creation(target, ident, ("sleep", "100000"), spec=change))
            await client.start_container(ident)

    async def body() -> None:
        await make(target, kept, f"pods/p1/{kept}")
        await make(target, broken, f"pods/p1/{broken}")
        (pod,) = {Path(path).parent.parent for path in below(fresh, f"/p1/{kept}")[:1]}
        stray = pod / "p2" / "stray"
        stray.mkdir(parents=True)
        sleeper = await asyncio.to_thread(subprocess.Popen, ["sleep", "60"])
        (stray / "cgroup.procs").write_text(str(sleeper.pid))
        (fresh.state_dir / "containers" / broken / "container.json").write_text("rubbish")
        await asyncio.to_thread(fresh.kill_agent)
        assert await asyncio.to_thread(eventually, lambda: not stray.parent.exists())
        assert await asyncio.to_thread(sleeper.wait, 10) == -9
        async with await connect(target) as client:
            assert (await client.container_state(kept)).status is Status.RUNNING
            assert (await client.container_state(broken)).status is Status.FAILED
            assert below(fresh, f"/p1/{broken}")
            assert (await run(client, kept, "echo", "alive")).stdout == b"alive\n"
            await remove(client, broken)
            assert not below(fresh, f"/p1/{broken}")
            assert below(fresh, f"/p1/{kept}")
            await remove(client, kept)
        assert not below(fresh, "/pods")

    asyncio.run(body())
