"""Disks that are plugged into a running VM, and what is mounted from them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from gcsagent.host import storage
from gcsagent.host.client import Client
from gcsagent.host.vm.launcher import VirtualMachine
from protocol.errors import Code
from protocol.families.storage import Device, Format, FsType, MountKind, MountStatus, MountStorage
from tests.cases.machines import Booted
from tests.cases.target import MIB, Target, connect, refused, run, running

# The first test boots the VM, and may build its image.
pytestmark = pytest.mark.timeout(1300)
ROOTFS = "/run/gcs/disks/rootfs"
SECONDS = 30.0


def image(path: Path, size: int) -> Path:
    """An empty disk."""
    with path.open("wb") as file:
        file.truncate(size)
    return path


def within(vm: Booted, story: Callable[[VirtualMachine, Target, Client], Awaitable[None]]) -> None:
    """Runs it; afterwards nothing is mounted and no disk plugged in that was not before."""
    target = Target(vm.machine.address, ROOTFS, box="", pace=vm.pace, execs=1)

    async def told() -> None:
        before = await vm.machine.disks()
        async with await connect(target) as client, asyncio.timeout(SECONDS * vm.pace):
            await story(vm.machine, target, client)
            assert await storage.list_mounts(client) == ()
            assert await vm.machine.disks() == before

    vm.runner.run(told())


def block(ident: str, serial: str, **more: object) -> MountStorage:
    return MountStorage(ident, MountKind.BLOCK, device=Device(serial=serial), **more)  # type: ignore[arg-type]


def test_a_disk_is_plugged_formatted_mounted_and_found_again(vm: Booted, tmp_path: Path) -> None:
    disk = image(tmp_path / "disk", 64 * MIB)

    async def story(machine: VirtualMachine, target: Target, client: Client) -> None:
        wanted = block("data", "data0", format=Format.ON_FIRST_USE, options=("noatime",))
        mounting = asyncio.create_task(storage.mount(client, wanted))
        await client.ping()
        assert (await storage.list_mounts(client))[0].status is MountStatus.MOUNTING
        await machine.plug_disk(disk, "data0")
        state = await mounting
        assert (state.fstype, state.formatted, state.target) == ("ext4", True, "/run/gcs/mounts/data")
        assert state.read_only is False
        assert await storage.mount(client, wanted) == state
        bound = {"destination": "/data", "source": state.target, "type": "bind", "options": ["bind"]}
        async with running(target, client, spec=lambda spec: spec["mounts"].append(bound)) as user:
            done = await run(client, user.container, "sh", "-c", "echo kept > /data/file && df -T /data")
            assert (done.exit.exit_code, b"ext4" in done.stdout) == (0, True), done
            with refused(Code.FAILED_PRECONDITION) as caught:
                await storage.unmount(client, "data")
            assert caught.value.details["containers"] == [user.container]
        assert await storage.unmount(client, "data") == ("data",)
        again = await storage.mount(client, block("again", "data0", fstype=FsType.EXT4, read_only=True))
        assert (again.formatted, again.read_only) == (False, True)
        assert await storage.unmount(client, "again") == ("again",)
        await machine.unplug_disk("data0")
        with refused(Code.NOT_FOUND, field="device"):
            await storage.mount(client, block("gone", "data0", wait_ms=100))

    within(vm, story)
    assert b"kept" in disk.read_bytes()
