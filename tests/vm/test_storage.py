"""Disks that are plugged into a running VM, and what is mounted from them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from gcsagent.host import storage
from gcsagent.host.client import Client
from gcsagent.host.vm.launcher import VirtualMachine
from protocol.errors import Code
from protocol.families.storage import (
    Device,
    Format,
    FsType,
    MountKind,
    MountState,
    MountStatus,
    MountStorage,
    Verity,
)
from tests.cases import disks
from tests.cases.killer import KILLER, kill_once, share_pids
from tests.cases.machines import Booted
from tests.cases.target import MIB, PIPES, Target, connect, refused, run, running

# The first test boots the VM, and may build its image.
pytestmark = pytest.mark.timeout(1300)
ROOTFS = "/run/gcs/disks/rootfs"
SECONDS = 30.0


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


@contextlib.asynccontextmanager
async def box(
    target: Target, client: Client, **where: MountState
) -> AsyncIterator[Callable[..., Awaitable[str]]]:
    """A container with these mounts below /; runs shell scripts in it."""
    more = [
        {"destination": f"/{name}", "source": state.target, "type": "bind", "options": ["bind"]}
        for name, state in where.items()
    ]
    async with running(target, client, spec=lambda spec: spec["mounts"].extend(more)) as inside:

        async def script(*lines: str) -> str:
            done = await run(client, inside.container, "sh", "-ec", "\n".join(lines))
            assert done.exit.exit_code == 0, done
            return done.stdout.decode()

        yield script


@contextlib.asynccontextmanager
async def plugged(machine: VirtualMachine, **images: Path) -> AsyncIterator[None]:
    for serial, path in images.items():
        await machine.plug_disk(path, serial)
    try:
        yield
    finally:
        for serial in images:
            await machine.unplug_disk(serial)


def test_a_disk_is_plugged_formatted_mounted_and_found_again(vm: Booted, tmp_path: Path) -> None:
    disk = disks.empty(tmp_path / "disk")

    async def story(machine: VirtualMachine, target: Target, client: Client) -> None:
        wanted = block("data", "data0", format=Format.ON_FIRST_USE, options=("noatime",))
        mounting = asyncio.create_task(storage.mount(client, wanted))
        while not (listed := await storage.list_mounts(client)):
            pass  # answered before what came with it had begun: each question is a round trip, not a spin
        assert listed[0].status is MountStatus.MOUNTING
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


def test_every_file_system_and_every_way_to_name_a_disk(vm: Booted, tmp_path: Path) -> None:
    swap, squashed = disks.empty(tmp_path / "swap"), disks.squashfs(tmp_path / "squashed")
    read_only = disks.erofs(tmp_path / "erofs", file="read only")
    xfs, foreign = disks.empty(tmp_path / "xfs", 320 * MIB), disks.empty(tmp_path / "foreign")
    foreign.write_bytes(b"precious".ljust(MIB, b"\0"))

    async def story(machine: VirtualMachine, target: Target, client: Client) -> None:
        images = {"xfs": xfs, "squashed": squashed, "erofs": read_only, "swap": swap, "foreign": foreign}
        async with plugged(machine, **images):
            made = block("x", "xfs", fstype=FsType.XFS, format=Format.ON_FIRST_USE)
            x = await storage.mount(client, made)
            assert (x.fstype, x.formatted, x.read_only) == ("xfs", True, False)
            by_pci = Device(pci="10.1/00.0")  # the second port of those made for plugging
            s = await storage.mount(client, MountStorage("s", MountKind.BLOCK, device=by_pci))
            e = await storage.mount(client, block("e", "erofs"))
            assert [(each.fstype, each.read_only) for each in (s, e)] == [("squashfs", True), ("erofs", True)]
            swapping = MountStorage(
                "w", MountKind.SWAP, device=Device(serial="swap"), format=Format.ON_FIRST_USE
            )
            w = await storage.mount(client, swapping)
            assert (w.fstype, w.target, w.formatted) == ("swap", "", True)
            async with box(target, client, x=x, s=s, e=e) as script:
                read = await script("cat /s/file /e/file", "echo written >/x/file", "cat /x/file /proc/swaps")
                assert read.startswith("squashed\nread onlywritten\n")
                assert w.source in read
                path = await script(f"readlink /sys/block/{e.source.removeprefix('/dev/')}")
            virtio = next(part for part in path.split("/") if part.startswith("virtio"))
            for name in (Device(virtio=virtio), Device(path=e.source)):
                again = await storage.mount(client, MountStorage("again", MountKind.BLOCK, device=name))
                assert again.source == e.source
                await storage.unmount(client, "again")
            for wrong in (
                block("f", "foreign", format=Format.ON_FIRST_USE),
                block("f", "erofs", fstype=FsType.XFS),
                block("f", "swap"),
            ):
                with refused(Code.FAILED_PRECONDITION):
                    await storage.mount(client, wrong)
            for mount in ("w", "e", "s", "x"):
                await storage.unmount(client, mount)

    within(vm, story)
    assert foreign.read_bytes().startswith(b"precious\0")


def test_dm_verity_reads_what_fits_the_root_hash_and_nothing_else(vm: Booted, tmp_path: Path) -> None:
    """The hashes behind the data, and on a disk of their own; a hash that is wrong, and a block that is."""
    image = disks.erofs(tmp_path / "erofs", file="x" * MIB)
    data = image.read_bytes()
    data = data.ljust(-(-len(data) // disks.BLOCK) * disks.BLOCK, b"\0")
    tree, root = disks.verity(data)
    both, plain, hashes, bad = (tmp_path / name for name in ("both", "plain", "hashes", "bad"))
    both.write_bytes(data + tree)
    plain.write_bytes(data)
    hashes.write_bytes(tree)
    at = data.rindex(b"x" * 100)
    bad.write_bytes(data[:at] + b"y" + data[at + 1 :])

    async def story(machine: VirtualMachine, target: Target, client: Client) -> None:
        async with plugged(machine, both=both, plain=plain, hashes=hashes, bad=bad):
            behind = Verity(root, hash_offset=len(data))
            beside = Verity(root, hash_device=Device(serial="hashes"))
            one = await storage.mount(client, block("one", "both", verity=behind))
            two = await storage.mount(client, block("two", "plain", verity=beside))
            assert all(each.read_only and each.source.startswith("/dev/dm-") for each in (one, two))
            broken = await storage.mount(client, block("broken", "bad", verity=beside))
            async with box(target, client, one=one, two=two, broken=broken) as script:
                assert await script("cat /one/file /two/file | tr -d x; wc -c </one/file") == f"{MIB}\n"
                assert (
                    await script("cat /broken/file >/dev/null 2>&1 && echo read || echo error") == "error\n"
                )
            for mount in ("broken", "two", "one"):
                await storage.unmount(client, mount)
            wrong = Verity("00" * 32, hash_offset=len(data))
            with refused(Code.FAILED_PRECONDITION, field="verity.root_hash"):
                await storage.mount(client, block("wrong", "both", verity=wrong))
            with refused(Code.FAILED_PRECONDITION):
                await storage.mount(client, block("none", "both", verity=Verity(root)))

    within(vm, story)


def test_trim_and_freeze_and_an_agent_that_dies_over_them(vm: Booted, tmp_path: Path) -> None:
    """What is not used goes back to the host; who writes waits, no longer than was said; mkfs goes on."""
    disk, other = disks.empty(tmp_path / "disk", 128 * MIB), disks.empty(tmp_path / "other", 320 * MIB)

    async def story(machine: VirtualMachine, target: Target, client: Client) -> None:
        command = ("python3", "-I", "-S", "-c", KILLER % (await client.info()).supervisor_pid)
        async with (
            plugged(machine, disk=disk, other=other),
            running(target, client, *command, stdio=PIPES, spec=share_pids) as killer,
        ):
            data = await storage.mount(client, block("data", "disk", format=Format.ON_FIRST_USE))
            async with box(target, client, data=data) as script:
                await script("dd if=/dev/urandom of=/data/big bs=1M count=32 2>/dev/null", "sync")
                full = disk.stat().st_blocks
                await script("rm /data/big", "sync")
                assert await storage.trim(client, "data") >= 32 * MIB
                assert disk.stat().st_blocks <= full - 30 * MIB // 512
                await storage.freeze(client, "data")
                writing = asyncio.ensure_future(script("echo new >/data/new", "sync -f /data", "echo done"))
                await kill_once(client, killer)
                [state] = await storage.list_mounts(client)
                assert 0 < state.frozen_ms <= 60_000
                assert not writing.done()
                await storage.freeze(client, "data", seconds=1.0)
                assert await writing == "done\n"
                [state] = await storage.list_mounts(client)
                assert state.frozen_ms == 0
                await storage.thaw(client, "data")
            wanted = block("other", "other", fstype=FsType.XFS, format=Format.ON_FIRST_USE)
            mounting = asyncio.create_task(storage.mount(client, wanted))
            await kill_once(client, killer)
            made = await mounting
            assert (made.fstype, made.status) == ("xfs", MountStatus.MOUNTED)
            assert await storage.mount(client, wanted) == made
            await storage.unmount(client, "other")
            await storage.unmount(client, "data")

    within(vm, story)
    assert other.read_bytes()[:4] == b"XFSB"
