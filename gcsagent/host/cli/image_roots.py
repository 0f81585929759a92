"""The root of a container that is run from an image: unpacked, put where the agent finds it, and released.

An agent on this machine is given the files themselves. A VM of ours is given them as a disk, plugged in and
mounted once for all containers that use it; which those are the agent knows, who refuses to unmount it for
as long. Whoever has ended or deleted a container releases what nobody uses any more. All in one VM take
turns at that, up to the moment that a new container is known to the agent.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from gcsagent.host import storage
from gcsagent.host.cli.common import UsageError, agent_address, complain
from gcsagent.host.cli.image_progress import shown_progress
from gcsagent.host.client import Client
from gcsagent.host.errors import ConnectFailed, ConnectionLost, HostError
from gcsagent.host.image.cache import Entry, Form, ImageCache
from gcsagent.host.image.documents import Config
from gcsagent.host.image.locks import lock
from gcsagent.host.vm.diskplug import DiskPlug
from gcsagent.host.vm.errors import VmError
from gcsagent.host.vm.hotplug import HotPlug
from gcsagent.host.vm.named import VmStore
from gcsagent.host.vm.running import ending_on_signals
from protocol.address import UnixAddress
from protocol.errors import Code, RpcError
from protocol.families.storage import Device, FsType, MountKind, MountStorage

_OURS = re.compile(r"image-[0-9a-f]{14}\Z")
"""Serial numbers of the disks, of which a disk has 20 characters, and ids of the mounts."""

_TURN_SECONDS = 120.0
_UNPLUG_SECONDS = 30.0
_ARRIVAL_MS = 60_000


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class ImageRoot:
    """``path`` is the root directory as the agent sees it. Call ``settled`` once a container has it."""

    path: str
    config: Config
    settled: Callable[[], None] = _nothing


async def prepared(args: argparse.Namespace) -> tuple[Entry, Path] | None:
    """The image of ``--image``, unpacked for the agent the command is for. Raises HostError, VmError."""
    if args.image is None:
        return None
    if args.rootfs is not None or args.bundle is not None:
        raise UsageError("give exactly one of --rootfs DIR, --image IMAGE and --bundle DIR")
    if not args.vm and not isinstance(agent_address(args), UnixAddress):
        raise UsageError(
            "--image goes with --vm NAME or an agent on this machine; for another VM,"
            " `gcsctl image load` makes a disk of it"
        )
    return await unpacked(args.image, Form.DISK if args.vm else Form.TREE)


async def unpacked(image: str, form: Form) -> tuple[Entry, Path]:
    """With its progress shown on a terminal. Raises HostError, VmError."""
    with ending_on_signals(), shown_progress() as progress:
        return await ImageCache().prepare(image, form, progress)


@asynccontextmanager
async def rooted(
    args: argparse.Namespace, client: Client, image: tuple[Entry, Path] | None
) -> AsyncIterator[ImageRoot | None]:
    """Where the agent finds it, for as long as this gcsctl has to do with the container."""
    if image is None:
        yield None
        return
    entry, path = image
    if not args.vm:
        yield ImageRoot(str(path), entry.config)
        return
    turn, reachable = await _turn(args.vm), True
    try:
        target = await _plugged(args.vm, client, f"image-{entry.ident.partition(':')[2][:14]}", path)
        yield ImageRoot(target, entry.config, turn.close)
    except (ConnectFailed, ConnectionLost):
        reachable = False
        raise
    finally:
        turn.close()
        if reachable:
            await release(args.vm, client, plugged=True)


async def release(vm: str, client: Client, *, plugged: bool = False) -> None:
    """Unmounts and unplugs the images that no container of the VM uses; says what cannot be done.

    Unless there are some ``plugged``, the VM's monitor is left alone as long as none is mounted.
    """
    try:
        mounts = await storage.list_mounts(client)
        if not plugged and not any(_OURS.match(each.mount) for each in mounts):
            return
        turn = await _turn(vm)
        try:
            await _release(vm, client)
        finally:
            turn.close()
    except (RpcError, HostError, VmError, OSError) as error:
        complain(f"an image that is no longer used stays in the VM: {error}")


async def _release(vm: str, client: Client) -> None:
    used = set()
    for each in await storage.list_mounts(client):
        if _OURS.match(each.mount):
            try:
                await storage.unmount(client, each.mount)
            except RpcError as error:
                if error.code is not Code.FAILED_PRECONDITION:
                    raise
                used.add(each.mount)
    async with HotPlug.at(VmStore().monitor(vm)) as ports:
        disks = DiskPlug(ports)
        for disk in await disks.all():
            if _OURS.match(disk.serial) and disk.removable and disk.serial not in used:
                await disks.unplug(disk.serial, _UNPLUG_SECONDS)


async def _plugged(vm: str, client: Client, serial: str, path: Path) -> str:
    async with HotPlug.at(VmStore().monitor(vm)) as ports:
        disks = DiskPlug(ports)
        if all(disk.serial != serial for disk in await disks.all()):
            await disks.plug(path, serial, read_only=True)
    wanted = MountStorage(
        serial,
        MountKind.BLOCK,
        device=Device(serial=serial),
        fstype=FsType.EROFS,
        read_only=True,
        wait_ms=_ARRIVAL_MS,
    )
    return (await storage.mount(client, wanted)).target


class _Turn:
    def __init__(self, fd: int) -> None:
        self._fd = fd

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


async def _turn(vm: str) -> _Turn:
    path = VmStore().directory(vm) / "images.lock"

    def opened() -> int:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    return _Turn(await lock(opened, path, _TURN_SECONDS, _nothing))
