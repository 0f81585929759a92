"""Signals to everybody in a cgroup, with the kernel's own cgroups of either version, while they fork."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gcsagent.agent import reach
from gcsagent.agent.cgroups import Cgroup, CgroupMounts
from gcsagent.agent.kernfs import KernelFiles
from tests.cases.agents import eventually

KINDS = {"v1": ("cgroup", "freezer"), "v2": ("cgroup2", "")}
MOST = 60
BOMB = f"""
import os, resource, sys
open(sys.argv[1], "w").write("0")
os.setuid(64321)
resource.setrlimit(resource.RLIMIT_NPROC, ({MOST}, {MOST}))
while True:
    try:
        if os.fork() and os.fork():
            os._exit(0)
    except OSError:
        pass
"""
"""A user of their own bounds them on any machine."""


@pytest.fixture(params=KINDS)
def bombed(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cgroup]:
    kind, options = KINDS[request.param]
    point = tmp_path / "cgroup"
    point.mkdir()
    mounting = ["mount", "-t", kind, *(("-o", options) if options else ()), "none", str(point)]
    subprocess.run(mounting, check=True, timeout=10)
    mounts = tmp_path / "mounts"
    mounts.write_text(f"none {point} {kind} rw 0 0\n")
    path = f"/gcs-test-reach-{os.getpid()}"
    directory = point / path[1:]
    try:
        directory.mkdir()
        bomb = subprocess.Popen([sys.executable, "-I", "-S", "-c", BOMB, directory / "cgroup.procs"])
        cgroup = Cgroup(CgroupMounts(str(mounts)), path)
        eventually(lambda: len(cgroup.pids()) > MOST // 2)
        yield cgroup
        bomb.wait(10)
    finally:
        asyncio.run(_clear(Cgroup(CgroupMounts(str(mounts)), path)))
        subprocess.run(["umount", str(point)], check=True, timeout=10)


async def _clear(cgroup: Cgroup) -> None:
    files = KernelFiles()
    await reach.kill_everybody(cgroup, files)
    await reach.wait_until_empty(cgroup, files)
    assert eventually(lambda: not cgroup.remove())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nobody_gets_away_by_forking(bombed: Cgroup, number: signal.Signals) -> None:
    async def body() -> None:
        files = KernelFiles()
        assert len(bombed.pids()) > 1
        assert await reach.signal_everybody(bombed, number, files) > 1
        assert not bombed.is_frozen()
        assert await reach.wait_until_empty(bombed, files, 5.0)

    asyncio.run(body())


def test_waiting_for_the_end_of_what_goes_on_ends(bombed: Cgroup) -> None:
    async def body() -> None:
        files = KernelFiles()
        assert not await reach.wait_until_empty(bombed, files, 0.2)
        await reach.kill_everybody(bombed, files)

    asyncio.run(body())
