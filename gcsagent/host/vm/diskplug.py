"""Disks plugged into a running VM: virtio-blk devices `disk-SERIAL`, over block nodes of that name."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path

from gcsagent.host.vm.errors import DiskError, InvalidVmConfig, QmpError
from gcsagent.host.vm.hotplug import HotPlug, no_plugged_one
from gcsagent.host.vm.qemu import disk_name, disk_node

_SERIAL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,19}\Z")


@dataclass(frozen=True, slots=True)
class PluggedDisk:
    """A disk the VM has: serial number, image file, and whether it can be unplugged."""

    serial: str
    path: str
    read_only: bool
    removable: bool


class DiskPlug:
    """The disks of one QEMU."""

    def __init__(self, ports: HotPlug) -> None:
        self._ports = ports

    async def all(self) -> list[PluggedDisk]:
        """The VM's disks, by serial number.

        Raises:
            QmpError: QEMU cannot be asked.
        """
        movable = await self._ports.plugged()
        found = []
        for drive in await self._ports.qmp.execute("query-block"):
            inserted, where = drive.get("inserted") or {}, str(drive.get("qdev", ""))
            ident = next((part for part in where.split("/") if part.startswith(disk_name(""))), "")
            if ident:
                serial = ident.removeprefix(disk_name(""))
                path = str(inserted.get("image", {}).get("filename") or inserted.get("file", ""))
                found.append(PluggedDisk(serial, path, bool(inserted.get("ro")), ident in movable))
        return sorted(found, key=lambda disk: disk.serial)

    async def plug(self, path: Path, serial: str, *, read_only: bool = False) -> None:
        """Gives the guest the raw image file, or block device, `path` as a virtio-blk disk.

        The guest may take a moment longer to find it; `storage.mount` waits for that.

        Raises:
            InvalidVmConfig: `serial` cannot be one, or is taken.
            DiskError: the file cannot be used.
            PlugError: all ports are taken.
            QmpError: QEMU refused.
        """
        if not _SERIAL.match(serial):
            raise InvalidVmConfig(
                f"serial number {serial!r} must be 1 to 20 letters, digits, '_', '.', '-', no sign first"
            )
        if any(disk.serial == serial for disk in await self.all()):
            raise InvalidVmConfig(f"the VM has a disk with serial number {serial} already")
        try:
            path = path.resolve(strict=True)
        except OSError as error:
            raise DiskError(f"disk image {path}: {error.strerror}") from error
        name = disk_name(serial)
        await self._ports.qmp.execute("blockdev-add", disk_node(path, serial, read_only=read_only))
        try:
            await self._ports.add({"driver": "virtio-blk-pci", "id": name, "drive": name, "serial": serial})
        except BaseException:
            with contextlib.suppress(QmpError):
                await self._drop_node(serial)
            raise

    async def unplug(self, serial: str, timeout: float) -> None:
        """Takes a disk from the guest, whether or not that still uses it; returns when QEMU has let it go.

        Args:
            timeout: seconds the guest may take to let go of it.

        Raises:
            DiskError: there is no such disk, or not one that was plugged in.
            QmpError: the guest or QEMU refused.
        """
        disk = next((disk for disk in await self.all() if disk.serial == serial), None)
        if disk is None or not disk.removable:
            raise DiskError(f"the disk with serial number {serial} {no_plugged_one(there=disk is not None)}")
        await self._ports.remove(disk_name(serial), timeout)
        await self._drop_node(serial)

    async def _drop_node(self, serial: str) -> None:
        await self._ports.drop("blockdev-del", {"node-name": disk_name(serial)})
