"""Plugs disks into a running VM and out of it again, by QEMU's monitor.

Nothing is remembered here: QEMU is asked what there is. So the process that launched a VM and a `gcsctl` that
comes by later see the same. A disk is a virtio-blk device `disk-SERIAL` over a block node of the same name,
behind one of the root ports that `qemu.py` makes for that.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tenacity

from gcsagent.host.vm.errors import DiskError, InvalidVmConfig, QmpClosed, QmpError
from gcsagent.host.vm.qemu import HOTPLUG_PORT, disk_name
from gcsagent.host.vm.qmp import QmpClient, QmpEvent

_SERIAL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,19}\Z")

# How long QEMU may take to free a device that it has announced as deleted.
_FREE_SECONDS = 5.0

_CONNECT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class PluggedDisk:
    """A disk the VM has: serial number, image file, and whether it can be unplugged."""

    serial: str
    path: str
    read_only: bool
    removable: bool


class DiskPlug:
    """The disks of one QEMU."""

    def __init__(self, qmp: QmpClient) -> None:
        self._qmp = qmp
        self._leaving: dict[str, asyncio.Future[None]] = {}

    @classmethod
    @asynccontextmanager
    async def at(cls, path: str) -> AsyncIterator[DiskPlug]:
        """Over the monitor that listens at `path`.

        Raises:
            QmpError: nobody does.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        plugs: list[DiskPlug] = []
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                await asyncio.get_running_loop().sock_connect(sock, path)
            qmp = await QmpClient.open(
                sock, lambda event: plugs[0].on_event(event) if plugs else None, timeout=_CONNECT_SECONDS
            )
        except (OSError, TimeoutError) as error:
            sock.close()
            raise QmpError(f"QEMU's monitor at {path} does not answer: {error}") from error
        except BaseException:
            sock.close()
            raise
        plugs.append(cls(qmp))
        try:
            yield plugs[0]
        finally:
            qmp.close()

    def on_event(self, event: QmpEvent) -> None:
        """To be told of every event of the monitor."""
        leaving = self._leaving.get(str(event.data.get("device")))
        if leaving is None or leaving.done():
            return
        if event.name == "DEVICE_DELETED":
            leaving.set_result(None)
        elif event.name == "DEVICE_UNPLUG_GUEST_ERROR":
            leaving.set_exception(QmpError("the guest refuses to let go of it"))

    def abandon(self) -> None:
        """The VM has ended."""
        for leaving in self._leaving.values():
            if not leaving.done():
                leaving.set_exception(QmpClosed("the VM has ended"))

    async def all(self) -> list[PluggedDisk]:
        """The VM's disks, by serial number.

        Raises:
            QmpError: QEMU cannot be asked.
        """
        movable = {device for _, devices in await self._ports() for device in devices}
        found = []
        for drive in await self._qmp.execute("query-block"):
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
            DiskError: the file cannot be used, or all ports are taken.
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
        await self._qmp.execute("blockdev-add", _node(path, serial, read_only))
        try:
            await self._add(serial)
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
            problem = "is there since the boot, and stays" if disk else "does not exist"
            raise DiskError(f"the disk with serial number {serial} {problem}")
        ident = disk_name(serial)
        leaving = self._leaving[ident] = asyncio.get_running_loop().create_future()
        try:
            await self._qmp.execute("device_del", {"id": ident})
            async with asyncio.timeout(timeout):
                await leaving
        except TimeoutError:
            raise QmpError(f"the guest did not let go of disk {serial} within {timeout:g} s") from None
        finally:
            leaving.cancel()
            del self._leaving[ident]
        await self._drop_node(serial)

    async def _add(self, serial: str) -> None:
        name = disk_name(serial)
        device = {"driver": "virtio-blk-pci", "id": name, "drive": name, "serial": serial}
        for port, devices in await self._ports():
            if devices:
                continue
            try:
                await self._qmp.execute("device_add", {**device, "bus": port})
                return
            except QmpClosed:
                raise
            except QmpError:
                if not dict(await self._ports()).get(port):
                    raise
                # Somebody else was faster: the next one, then.
        raise DiskError("all ports for plugging are taken; unplug something first")

    async def _ports(self) -> list[tuple[str, list[str]]]:
        """The ports for plugging, each with the ids of what is behind it."""
        found = []
        for bus in await self._qmp.execute("query-pci"):
            for device in bus.get("devices", ()):
                if str(device.get("qdev_id", "")).startswith(HOTPLUG_PORT):
                    behind = device.get("pci_bridge", {}).get("devices", ())
                    found.append((str(device["qdev_id"]), [str(each.get("qdev_id")) for each in behind]))
        return found

    async def _drop_node(self, serial: str) -> None:
        # QEMU announces the deletion first and frees the device at its leisure (RCU); until then its node is
        # busy, and nothing tells when it no longer is.
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(_may_pass),
            wait=tenacity.wait_exponential(multiplier=0.002, max=0.5),
            stop=tenacity.stop_after_delay(_FREE_SECONDS),
            reraise=True,
        )
        await retrying(self._qmp.execute, "blockdev-del", {"node-name": disk_name(serial)})


def _node(path: Path, serial: str, read_only: bool) -> dict[str, Any]:
    # A device's file is opened by another driver than a regular one's.
    driver = "host_device" if path.is_block_device() else "file"
    options = {"read-only": read_only, "discard": "unmap"}
    file = {"driver": driver, "filename": str(path), **options}
    return {"driver": "raw", "node-name": disk_name(serial), **options, "file": file}


def _may_pass(error: BaseException) -> bool:
    return isinstance(error, QmpError) and not isinstance(error, QmpClosed)
