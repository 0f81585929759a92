"""A server from Debian in a container of the VM, and its own clients on this machine, over vsock."""

from __future__ import annotations

import asyncio

import pytest

from gcsagent.host.vm.tools import cache_dir
from tests.cases import servers
from tests.cases.machines import Booted
from tests.cases.target import Target

# The first test boots the VM, and may build its image.
pytestmark = pytest.mark.timeout(1300)
ROOTFS = "/run/gcs/disks/rootfs"
SECONDS = 300.0


async def _within(target: Target, load: servers.Load) -> str:
    here = str((cache_dir() / "demo-rootfs" / "current" / "rootfs").resolve())
    async with asyncio.timeout(SECONDS):
        return await servers.redis_under_load(target, here, load)


def test_redis_serves_its_own_benchmark(vm: Booted) -> None:
    load = servers.FULL if vm.machine.accel.name == "kvm" else servers.UNDER_EMULATION
    print(vm.runner.run(_within(Target(vm.machine.address, ROOTFS, box="", pace=vm.pace, execs=1), load)))
