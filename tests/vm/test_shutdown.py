"""How a VM ends: containers in order and in time, disks written out, whatever state the agent is in."""

from __future__ import annotations

import asyncio
import contextlib
import struct
import subprocess
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gcsagent.host import shell, storage
from gcsagent.host.client import Client
from gcsagent.host.errors import AgentSilent
from gcsagent.host.shell import NoShell
from gcsagent.host.vm.config import VmConfig, VmExit
from gcsagent.host.vm.launcher import VirtualMachine
from protocol.families.storage import Device, Format, MountKind, MountStorage
from protocol.method import Empty
from tests.cases.machines import PACE
from tests.cases.target import MIB, Target, connect, creation, run
from tests.vm.test_guest import gcsctl

# The first test boots the VM, and may build its image.
pytestmark = pytest.mark.timeout(1300)
ROOTFS = "/run/gcs/disks/rootfs"
BOOT_SECONDS, SECONDS = 240.0, 180.0
GRACE = 3.0
DEAF = "trap '' TERM; echo deaf > /data/deaf; while :; do sleep 0.1; done"
TIDY = "trap 'echo tidy > /data/tidy; exit 0' TERM; echo up > /data/up; while :; do sleep 0.1; done"


def needs_recovery(disk: Path) -> bool:
    """Whether ext4 was not unmounted (s_feature_incompat, INCOMPAT_RECOVER)."""
    with disk.open("rb") as file:
        file.seek(1024 + 0x60)
        return bool(struct.unpack("<I", file.read(4))[0] & 0x4)


def files(disk: Path) -> set[str]:
    listing = subprocess.run(
        ["debugfs", "-R", "ls -p /", disk], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    return {line.split("/")[5] for line in listing.splitlines() if line.startswith("/")}


@contextlib.asynccontextmanager
async def machine_with(config: VmConfig, disk: Path) -> AsyncIterator[tuple[VirtualMachine, Target, Client]]:
    """A VM with a disk mounted at /run/gcs/mounts/data."""
    with disk.open("wb") as file:
        file.truncate(64 * MIB)
    async with asyncio.timeout(BOOT_SECONDS):
        machine = await VirtualMachine.launch(config)
    try:
        target = Target(machine.address, ROOTFS, box="", pace=PACE[machine.accel.name], execs=1)
        async with await connect(target) as client, asyncio.timeout(SECONDS):
            await machine.plug_disk(disk, "data0")
            wanted = MountStorage(
                "data", MountKind.BLOCK, device=Device(serial="data0"), format=Format.ON_FIRST_USE
            )
            await storage.mount(client, wanted)
            assert needs_recovery(disk)
            yield machine, target, client
    finally:
        print("\n".join(machine.console.lines()[-40:]))
        machine.destroy()


async def start(client: Client, target: Target, ident: str, script: str) -> None:
    """A container with the disk at /data that is not going to be removed by anybody but the shutdown."""

    def bind(spec: dict[str, Any]) -> None:
        bound = {
            "destination": "/data",
            "source": "/run/gcs/mounts/data",
            "type": "bind",
            "options": ["bind"],
        }
        spec["mounts"].append(bound)
        if ident == "hand":
            namespaces = spec["linux"]["namespaces"]
            spec["linux"]["namespaces"] = [each for each in namespaces if each["type"] != "pid"]

    await client.create_container(creation(target, ident, ("sh", "-c", script), spec=bind))
    await client.start_container(ident)


async def written(client: Client, container: str, name: str) -> None:
    async with asyncio.timeout(60):
        while (await run(client, container, "test", "-e", f"/data/{name}")).exit.exit_code != 0:
            pass


async def ping_for_ever(client: Client) -> None:
    while True:
        await client.call("agent.ping", Empty(), deadline=1.0)


def vm_config(image: Path, rootfs: Path, folder: Path, *words: str) -> VmConfig:
    return VmConfig(name="ending", image=image, rootfs=rootfs, console_log=folder / "console", cmdline=words)


async def rebooted(image: Path, rootfs: Path, folder: Path) -> tuple[VmExit, float]:
    """How it ended, and how many seconds that took."""
    async with machine_with(vm_config(image, rootfs, folder), folder / "disk") as (machine, target, client):
        with pytest.raises(NoShell, match="is not allowed there"):
            await shell.connect(shell.shell_address(machine.address), "tests")
        await start(client, target, "deaf", DEAF)
        await start(client, target, "tidy", TIDY)
        await written(client, "deaf", "deaf")
        await written(client, "tidy", "up")
        begun = time.monotonic()
        done = await gcsctl(target.address, "shutdown", "--reboot", "--grace", str(GRACE))
        assert done == {"action": "reboot", "grace_ms": int(GRACE * 1000)}
        return await machine.wait(), time.monotonic() - begun


async def powered_off(image: Path, rootfs: Path, folder: Path) -> VmExit:
    """Without a watchdog, and with its agent stopped."""
    config = vm_config(image, rootfs, folder, "gcs.watchdog=off")
    async with machine_with(config, folder / "disk") as (machine, target, client):
        await start(client, target, "hand", "sleep 100000")
        agent = (await client.info()).agent_pid
        stop = f"echo late > /data/late; (sleep 1; kill -STOP {agent}) & exit 0"
        await run(client, "hand", "sh", "-c", stop)
        with pytest.raises(AgentSilent):
            await ping_for_ever(client)
        return await machine.powerdown(150)


@dataclass(frozen=True)
class Endings:
    """Two VMs' last minutes, side by side: the second one's are spent on waiting."""

    reboot: tuple[VmExit, float]
    button: VmExit
    folders: tuple[Path, Path]


@pytest.fixture(scope="module")
def endings(built_image: Path, rootfs_image: Path, tmp_path_factory: pytest.TempPathFactory) -> Endings:
    folders = tmp_path_factory.mktemp("reboot"), tmp_path_factory.mktemp("button")

    async def both() -> tuple[tuple[VmExit, float], VmExit]:
        async with asyncio.TaskGroup() as stories:
            reboot = stories.create_task(rebooted(built_image, rootfs_image, folders[0]))
            button = stories.create_task(powered_off(built_image, rootfs_image, folders[1]))
        return reboot.result(), button.result()

    return Endings(*asyncio.run(both()), folders)


def test_containers_have_their_grace_and_a_reboot_is_seen(endings: Endings) -> None:
    (ended, took), disk = endings.reboot, endings.folders[0] / "disk"
    assert (ended.clean, ended.findings) == (True, ())
    assert "rebooted" in ended.reason
    assert GRACE <= took < SECONDS / 2
    assert not needs_recovery(disk)
    assert {"deaf", "tidy", "up"} <= files(disk)


def test_the_power_button_works_though_the_agent_stands_still(endings: Endings) -> None:
    """No watchdog: it is the supervisor's own time that runs out, and it unmounts what nobody else has."""
    ended, folder = endings.button, endings.folders[1]
    assert (ended.clean, ended.reason, ended.findings) == (True, "the guest powered off", ())
    assert '"unmounting what is left"' in (folder / "console").read_text(errors="replace")
    assert not needs_recovery(folder / "disk")
    assert "late" in files(folder / "disk")
