"""Makes a VM from a snapshot's directory: all the guest has is as it was, but for what is to be its own.

Its own are the vsock device, plugged in behind a CID and sockets of this VM, copies of the disks it can write
to, the time, and its random numbers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from gcsagent.host.client import Client
from gcsagent.host.errors import HostError
from gcsagent.host.vm.config import OWN, VmConfig
from gcsagent.host.vm.copying import copy, link_or_copy
from gcsagent.host.vm.disk import Disk
from gcsagent.host.vm.errors import LaunchError, QmpError, SnapshotError
from gcsagent.host.vm.guest import Guest
from gcsagent.host.vm.nic import Nic, nic_backend, nic_device
from gcsagent.host.vm.qemu import disk_name, disk_node
from gcsagent.host.vm.saving import MEMORY_SECONDS, patiently
from gcsagent.host.vm.snapshotdir import DISKS, MEMORY, Saved, SavedDisk
from protocol.errors import RemoteProtocolError, RpcError


def settled(config: VmConfig, saved: Saved) -> VmConfig:
    """The VM that `config` asks for, with all that comes from its snapshot."""
    old = VmConfig.from_json(saved.config)
    own = {name: getattr(config, name) for name in OWN if name not in ("image", "snapshot")}
    return replace(old, **own, image=config.image or old.image, accel=saved.accel)


async def disks(saved: Saved, directory: Path, scratch: Path) -> dict[str, Path]:
    """Its disks' images by serial number, with copies in `scratch` of those it may write to.

    Raises:
        SnapshotError: a disk that was not copied is gone, or has changed.
        DiskError: one cannot be copied.
    """
    found = {}
    for disk in saved.disks:
        path = Path(disk.path)
        if disk.copied:
            path = scratch / disk.serial
            make = link_or_copy if disk.read_only else copy
            await make(directory / DISKS / disk.serial, path)
        else:
            _check_unchanged(disk, path)
        found[disk.serial] = path
    return found


def booted(saved: Saved, found: dict[str, Path]) -> tuple[Disk, ...]:
    """The disks that were there since the boot."""
    return tuple(
        Disk(found[disk.serial], disk.serial, disk.fstype, disk.read_only)
        for disk in saved.disks
        if not disk.port
    )


def plugged(saved: Saved, found: dict[str, Path]) -> tuple[str, ...]:
    """Words of QEMU's command line for what had been plugged in while the saved VM ran."""
    words: list[str] = []
    for disk in saved.disks:
        if disk.port:
            name = disk_name(disk.serial)
            node = disk_node(found[disk.serial], disk.serial, read_only=disk.read_only)
            device = {"driver": "virtio-blk-pci", "id": name, "drive": name, "serial": disk.serial}
            words += [
                "-blockdev",
                json.dumps(node),
                "-device",
                _at(device, disk.port),
            ]
    for each in saved.nics:
        nic = Nic(each.mac)
        words += ["-netdev", json.dumps(nic_backend(nic)), "-device", _at(nic_device(nic), each.port)]
    return tuple(words)


async def go_on(
    guest: Guest,
    saved: Saved,
    directory: Path,
    address: str,
    seconds: float,
    progress: Callable[[str], None],
) -> None:
    """Returns once the guest has answered, with its clock set and keys of its own.

    Raises:
        LaunchError: QEMU cannot load it, or the guest does not answer within `seconds`.
    """
    memory = directory / MEMORY
    try:
        progress("loading its memory")
        await guest.migration.load(memory, MEMORY_SECONDS)
        await guest.plug_vsock()
        await guest.qmp.execute("cont")
    except QmpError as error:
        reason = f"QEMU cannot load {memory}, which QEMU {saved.qemu} wrote: {error}"
        raise LaunchError(await guest.why(reason)) from error
    progress("it goes on; waiting for its agent")
    try:
        async with await Client.connect(address, timeout=seconds) as client:
            await patiently(client, saved.snapshot, seconds)
    except (HostError, RpcError, RemoteProtocolError) as error:
        raise LaunchError(await guest.why(f"the restored guest does not answer: {error}")) from error


def _check_unchanged(disk: SavedDisk, path: Path) -> None:
    try:
        there = path.stat()
    except OSError as error:
        raise SnapshotError(f"disk {disk.serial}: {path}: {error.strerror}") from error
    if path.is_file() and (there.st_size, there.st_mtime_ns) != (disk.size, disk.mtime_ns):
        raise SnapshotError(f"disk {disk.serial}: {path} has changed since the snapshot was made")


def _at(device: Mapping[str, object], port: str) -> str:
    return json.dumps({**device, "bus": port})
