"""Saves a running VM to a directory, as one transaction with its guest; see protocol/SPEC.md, Snapshots.

The guest holds still, its vsock device is unplugged, since QEMU cannot save a vhost-user device, its CPUs are
stopped, memory and disks are copied. However that ends, the VM then goes on: device, CPUs, clock, random
numbers. The directory gets its name when all is in it.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tenacity

from gcsagent.host import snapshot
from gcsagent.host.client import Client
from gcsagent.host.errors import AgentSilent, HostError
from gcsagent.host.vm import snapshotdir
from gcsagent.host.vm.config import OWN
from gcsagent.host.vm.copying import copy, link_or_copy
from gcsagent.host.vm.diskplug import DiskPlug
from gcsagent.host.vm.errors import SnapshotError, VmError
from gcsagent.host.vm.nic import Nic
from gcsagent.host.vm.nicplug import NicPlug
from gcsagent.host.vm.qemu import VSOCK_DEVICE, disk_name
from gcsagent.host.vm.snapshotdir import DISKS, MEMORY, Saved, SavedDisk, SavedNic
from protocol import checks
from protocol.errors import RemoteProtocolError, RpcError

if TYPE_CHECKING:
    from gcsagent.host.vm.guest import Guest
    from gcsagent.host.vm.launcher import VirtualMachine

OLDEST_QEMU = (8, 2)
"""The first that writes to a file by itself."""

UNPLUG_SECONDS, MEMORY_SECONDS = 60.0, 1800.0

_MARGIN_SECONDS = 1.0
"""For the time that the guest's answer took."""

_TROUBLE = (VmError, HostError, RpcError, RemoteProtocolError, OSError)


async def save(vm: VirtualMachine, directory: Path, *, hold: float, progress: Callable[[str], None]) -> Saved:
    """See VirtualMachine.save."""
    directory = directory.absolute()
    name = directory.name if checks.identifier(directory.name) is None else "snapshot"
    saved = await _describe(vm, name)
    new = _make(directory)
    try:
        with snapshotdir.held(new):
            saved = await _take(vm, saved, new, hold, progress)
            saved.write(new)
            await asyncio.to_thread(_settle, new, directory)
    except BaseException as error:
        shutil.rmtree(new, ignore_errors=True)
        if isinstance(error, OSError):
            raise SnapshotError(f"cannot save to {directory}: {error}") from error
        if isinstance(error, (HostError, RpcError, RemoteProtocolError)):
            raise SnapshotError(f"the guest cannot be held: {error}") from error
        raise
    return saved


@asynccontextmanager
async def standing_still(vm: VirtualMachine, name: str, hold: float) -> AsyncIterator[None]:
    """The guest is held and its CPUs are stopped in the block; its device stays, and with it connections.

    Raises:
        SnapshotError: it went on by itself before its CPUs were stopped, or cannot go on.
        HostError, RpcError: the guest could not be held.
    """
    async with await Client.connect(vm.address) as client:
        still = _Still(vm, client, name, unplug=False)
        async with still.held(hold):
            yield


class _Still:
    """A guest on its way to standing still, and back from wherever it has come to."""

    def __init__(self, vm: VirtualMachine, client: Client, name: str, *, unplug: bool) -> None:
        self._vm, self._client, self._name, self._unplug = vm, client, name, unplug
        self.seconds = 0.0

    @asynccontextmanager
    async def held(self, hold: float) -> AsyncIterator[None]:
        clock = asyncio.get_running_loop().time
        answer = await snapshot.prepare(self._client, self._name, hold=hold)
        until = clock() + answer.hold_ms / 1000 - _MARGIN_SECONDS
        stopped = False
        try:
            if self._unplug:
                await self._vm.guest.unplug_vsock(UNPLUG_SECONDS)
            await self._vm.pause()
            stopped, begun = True, clock()
            if begun > until:
                raise SnapshotError(
                    f"the guest was held for {hold:g} s, and it took longer to stop it: hold it longer"
                )
            yield
        except BaseException as error:
            try:
                await _whatever_comes(self._go_on(stopped))
            except _TROUBLE as worse:
                raise SnapshotError(f"{error}; and the VM does not go on: {worse}") from error
            raise
        self.seconds = clock() - begun
        try:
            await _whatever_comes(self._go_on(stopped))
        except _TROUBLE as error:
            raise SnapshotError(f"the VM does not go on: {error}") from error

    async def _go_on(self, stopped: bool) -> None:
        try:
            if stopped:
                await self._vm.resume()
        finally:
            await self._vm.guest.plug_vsock()
        await patiently(self._client, self._name, UNPLUG_SECONDS)


async def patiently(client: Client, name: str, seconds: float) -> None:
    """Has the guest go on, which may take a while to find its device on a busy host."""
    retrying = tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception_type(AgentSilent),
        stop=tenacity.stop_after_delay(seconds),
        reraise=True,
    )
    await retrying(snapshot.resume, client, name)


async def _take(
    vm: VirtualMachine, saved: Saved, new: Path, hold: float, progress: Callable[[str], None]
) -> Saved:
    # Patient, for the guest has to find its device again.
    async with await Client.connect(vm.address, patience=UNPLUG_SECONDS) as client:
        progress(f"holding the guest, for {hold:g} s at most")
        still = _Still(vm, client, saved.snapshot, unplug=True)
        async with still.held(hold):
            progress("saving its memory")
            await vm.guest.migration.save(new / MEMORY, MEMORY_SECONDS)
            disks = [await _save_disk(vm, disk, new / DISKS / disk.serial, progress) for disk in saved.disks]
        progress(f"it goes on, having stood still for {still.seconds:.1f} s")
    return replace(saved, created=time.time(), stopped_seconds=still.seconds, disks=tuple(disks))


async def _save_disk(
    vm: VirtualMachine, disk: SavedDisk, target: Path, progress: Callable[[str], None]
) -> SavedDisk:
    source = Path(disk.path)
    if not disk.read_only:
        progress(f"copying disk {disk.serial}")
        await copy(source, target)
    elif vm.owns(source):
        await link_or_copy(source, target)
    else:
        there = source.stat()
        return replace(disk, size=there.st_size, mtime_ns=there.st_mtime_ns)
    return replace(disk, copied=True)


# -- what there is to save --------------------------------------------------------------------------------


async def _describe(vm: VirtualMachine, name: str) -> Saved:
    """Raises SnapshotError for a VM that cannot be saved."""
    qmp = vm.monitor
    version = (await qmp.execute("query-version"))["qemu"]
    if (version["major"], version["minor"]) < OLDEST_QEMU:
        wanted = ".".join(map(str, OLDEST_QEMU))
        raise SnapshotError(f"QEMU {version['major']}.{version['minor']} cannot save to a file: {wanted} can")
    await _check_devices(vm.guest)
    machine = str(await qmp.execute("qom-get", {"path": "/machine", "property": "type"}))
    config = replace(vm.config, rootfs=None, disks=(), mac=vm.nics[0].mac if vm.nics else None).to_json()
    places = await vm.guest.ports.places()
    nics = [nic for nic in await NicPlug(vm.guest.ports).all() if nic.removable]
    return Saved(
        snapshot=name,
        vm=vm.config.name,
        config={key: value for key, value in json.loads(json.dumps(config)).items() if key not in OWN}
        | {"image": str(vm.image_directory)},
        accel=vm.accel.name,
        machine=machine.removesuffix("-machine"),
        qemu="{major}.{minor}.{micro}".format(**version),
        created=0.0,
        stopped_seconds=0.0,
        disks=await _disks(vm, places),
        nics=tuple(SavedNic(nic.mac, places[Nic(nic.mac).name]) for nic in nics),
    )


async def _check_devices(guest: Guest) -> None:
    for path in ("/machine/peripheral", "/machine/peripheral-anon"):
        for child in await guest.qmp.execute("qom-list", {"path": path}):
            kind, name = str(child.get("type", "")), str(child.get("name", ""))
            if kind.startswith("child<vhost-user-") and name != VSOCK_DEVICE:
                what = re.sub(r"child<(.*)-pci>", r"\1", kind)
                raise SnapshotError(
                    f"device {name} ({what}) cannot be saved: its state is in another process"
                )
            if name.startswith(("cpu-", "dimm")):
                raise SnapshotError(
                    f"{name} was plugged in while the VM ran: a VM that has grown is not saved"
                )


async def _disks(vm: VirtualMachine, places: dict[str, str]) -> tuple[SavedDisk, ...]:
    booted = [
        SavedDisk(disk.name, disk.fstype, str(disk.path.absolute()), disk.read_only, copied=False)
        for disk in vm.booted_disks
    ]
    plugged = [
        SavedDisk(
            disk.serial, "", disk.path, disk.read_only, copied=False, port=places[disk_name(disk.serial)]
        )
        for disk in await DiskPlug(vm.guest.ports).all()
        if disk.removable
    ]
    return (*booted, *plugged)


# -- the directory ----------------------------------------------------------------------------------------


def _make(directory: Path) -> Path:
    """One beside it, under a name that is no snapshot's. Raises SnapshotError."""
    if directory.exists():
        raise SnapshotError(f"{directory} is there already; choose another name, or remove it")
    snapshotdir.sweep(directory)
    new = snapshotdir.unfinished(directory)
    try:
        directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        new.mkdir(mode=0o700)
        (new / DISKS).mkdir()
    except OSError as error:
        raise SnapshotError(f"cannot make {new}: {error.strerror}") from error
    return new


def _settle(new: Path, directory: Path) -> None:
    """Its files are on the disk before it has its name. Raises OSError."""
    for path in (*new.rglob("*"), new):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    os.rename(new, directory)


async def _whatever_comes(work: Coroutine[Any, Any, None]) -> None:
    """To its end, also when this task is cancelled: what it takes is bounded."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        if not task.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait((task,))
        raise
