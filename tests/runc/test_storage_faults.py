"""SIGKILL at every step of mounting and unmounting: afterwards it is wholly done, and nothing is left."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from gcsagent.host import storage
from protocol.families.storage import MountKind, MountStatus, MountStorage
from tests.cases.agents import RunningAgent, stopped_clean
from tests.cases.storage import bind, tmpfs
from tests.cases.target import name
from tests.runc.test_fault_points import FAULTS, Act, Bench, walk

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def faulty(rootfs: str) -> Iterator[RunningAgent]:
    yield from stopped_clean(RunningAgent("--log-level", "debug", python_path=str(FAULTS)))


def mounted_on(path: str) -> int:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return sum(line.split()[4] == path for line in lines)


async def mount_in_a_new_place(bench: Bench, arm: Act) -> None:
    where = str(bench.running.directory / "new" / "place")
    wanted = tmpfs(name("m"), target=where)
    await arm()
    state = await storage.mount(bench.client, wanted)
    assert (state.status, mounted_on(where)) == (MountStatus.MOUNTED, 1)
    assert [each.mount for each in await storage.list_mounts(bench.client)] == [wanted.mount]
    await storage.unmount(bench.client, wanted.mount)
    assert (mounted_on(where), os.path.exists(os.path.dirname(where))) == (0, False)


async def unmount_what_is_stacked(bench: Bench, arm: Act) -> None:
    base = await storage.mount(bench.client, tmpfs(name("m")))
    kept = await storage.mount(bench.client, bind(name("b"), base.target, read_only=True))
    other = await storage.mount(bench.client, tmpfs(name("m"), target=f"{base.target}/other"))
    lower = (other.target, kept.target)
    over = await storage.mount(bench.client, MountStorage(name("o"), MountKind.OVERLAY, lower=lower))
    await arm()
    await storage.unmount(bench.client, base.mount, dependents=True)
    assert await storage.list_mounts(bench.client) == ()
    assert [mounted_on(each.target) for each in (base, kept, other, over)] == [0] * 4
    assert not any(os.path.exists(each.target) for each in (base, kept, other, over))


async def drop_a_holder(bench: Bench, arm: Act) -> None:
    base = await storage.mount(bench.client, tmpfs(name("m")))
    also = name("m")
    await arm()
    await storage.mount(bench.client, tmpfs(also, target=base.target))
    assert await storage.unmount(bench.client, base.mount) == ()
    assert (await storage.list_mounts(bench.client))[0].holders == (also,)
    await storage.unmount(bench.client, also)


def test_killed_at_each_step_of_mount(faulty: RunningAgent, rootfs: str) -> None:
    walk(faulty, rootfs, mount_in_a_new_place)


def test_killed_at_each_step_of_unmount(faulty: RunningAgent, rootfs: str) -> None:
    walk(faulty, rootfs, unmount_what_is_stacked)


def test_killed_at_each_step_of_dropping_a_holder(faulty: RunningAgent, rootfs: str) -> None:
    walk(faulty, rootfs, drop_a_holder)
