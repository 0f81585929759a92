"""gcsctl storage: what is mounted in the guest, and gcsctl vm disk: which disks it has."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gcsagent.host import storage
from gcsagent.host.cli.argument_types import checked, patience, typed
from gcsagent.host.cli.common import UsageError, connect, print_json, print_table, say, since_when
from gcsagent.host.cli.declare import Add, add_group, add_vm_name
from gcsagent.host.cli.resources import parse_size, size
from gcsagent.host.vm.found import FoundVm
from protocol import checks, mountchecks
from protocol.families.storage import Device, Format, FsType, MountKind, MountState, MountStorage, Verity

_DEVICES = ("serial", "pci", "virtio", "device")


def add_storage_commands(commands: Any, add: Add) -> None:
    below = add_group(
        commands, "storage", "mount disks, layers and directories in the guest", "gcsctl storage ls"
    )
    parser = add(
        below,
        "mount",
        mount,
        "mount a disk, a directory the host shares, layers, memory or a directory; or swap to a disk",
        "gcsctl --vm dev storage mount data --serial data0 --format",
    )
    _add_mount_options(parser)
    parser = add(
        below,
        "unmount",
        unmount,
        "unmount it, unless others hold it or use it",
        "gcsctl --vm dev storage unmount data",
    )
    parser.add_argument("--dependents", action="store_true", help="first the mounts built on it")
    _add_id(parser)
    add(below, "ls", ls, "list the mounts, in their order", "gcsctl --vm dev storage ls")
    _add_id(
        add(
            below,
            "trim",
            trim,
            "give the device back what is not used",
            "gcsctl --vm dev storage trim data",
        )
    )
    parser = add(
        below,
        "freeze",
        freeze,
        "flush a file system and hold its writers off",
        "gcsctl --vm dev storage freeze --for 10 data",
    )
    parser.add_argument(
        "--for",
        dest="seconds",
        type=patience,
        default=60.0,
        metavar="SECONDS",
        help="it thaws by itself then, default: %(default)g",
    )
    _add_id(parser)
    _add_id(add(below, "thaw", thaw, "let writers go on", "gcsctl --vm dev storage thaw data"))


def add_disk_commands(commands: Any, add: Add) -> None:
    """`vm disk`, below `vm`."""
    below = add_group(
        commands,
        "disk",
        "plug disks into a running VM, unplug and list them",
        "gcsctl vm disk add dev data.img",
    )
    parser = add(
        below,
        "add",
        disk_add,
        "plug a raw image file or block device in as a disk",
        "gcsctl vm disk add dev ./data.img --serial data0",
    )
    add_vm_name(parser)
    parser.add_argument("path", type=Path, metavar="FILE")
    parser.add_argument("--serial", metavar="S", help="the disk's name in the guest; default: FILE's name")
    parser.add_argument("--read-only", action="store_true", help="the guest cannot write to it")
    parser = add(below, "rm", disk_rm, "unplug a disk; unmount it first", "gcsctl vm disk rm dev data0")
    add_vm_name(parser)
    parser.add_argument("serial", metavar="SERIAL")
    parser = add(below, "ls", disk_ls, "list a VM's disks", "gcsctl vm disk ls dev")
    add_vm_name(parser)


# -- storage ------------------------------------------------------------------------------------------


async def mount(args: argparse.Namespace) -> int:
    wanted = _wanted(args)
    async with await connect(args) as client:
        state = await storage.mount(client, wanted)
    if args.json:
        print_json(state)
    else:
        say(state.target or state.source)
    return 0


async def unmount(args: argparse.Namespace) -> int:
    async with await connect(args) as client:
        gone = await storage.unmount(client, args.id, dependents=args.dependents)
    if args.json:
        print_json({"unmounted": gone})
    return 0


async def ls(args: argparse.Namespace) -> int:
    async with await connect(args) as client:
        found = await storage.list_mounts(client)
    if args.json:
        print_json(found)
        return 0
    rows = [(",".join(each.holders), _status(each), each.fstype, each.source, each.target) for each in found]
    print_table(("MOUNT", "STATUS", "TYPE", "SOURCE", "TARGET"), rows)
    return 0


async def trim(args: argparse.Namespace) -> int:
    async with await connect(args) as client:
        trimmed = await storage.trim(client, args.id)
    print_json({"mount": args.id, "bytes": trimmed}) if args.json else print(size(trimmed))
    return 0


async def freeze(args: argparse.Namespace) -> int:
    async with await connect(args) as client:
        await storage.freeze(client, args.id, seconds=args.seconds)
    if args.json:
        print_json({"mount": args.id, "seconds": args.seconds})
    return 0


async def thaw(args: argparse.Namespace) -> int:
    async with await connect(args) as client:
        await storage.thaw(client, args.id)
    if args.json:
        print_json({"mount": args.id})
    return 0


# -- vm disk ------------------------------------------------------------------------------------------


async def disk_add(args: argparse.Namespace) -> int:
    serial = args.serial or args.path.stem[:20]
    await FoundVm.named(args.name).plug_disk(args.path, serial, read_only=args.read_only)
    print_json({"serial": serial, "path": str(args.path)}) if args.json else print(serial)
    return 0


async def disk_rm(args: argparse.Namespace) -> int:
    await FoundVm.named(args.name).unplug_disk(args.serial)
    if args.json:
        print_json({"serial": args.serial})
    return 0


async def disk_ls(args: argparse.Namespace) -> int:
    found = await FoundVm.named(args.name).disks()
    if args.json:
        print_json(found)
        return 0
    rows = [
        (
            each.serial,
            "ro" if each.read_only else "rw",
            since_when(each.removable),
            each.path,
        )
        for each in found
    ]
    print_table(("SERIAL", "MODE", "REMOVABLE", "FILE"), rows)
    return 0


# -- the command line ---------------------------------------------------------------------------------


def _add_mount_options(parser: argparse.ArgumentParser) -> None:
    _add_kinds(parser)
    parser.add_argument("--target", type=_path, metavar="DIR", help="where; default: /run/gcs/mounts/ID")
    parser.add_argument("--swap", action="store_true", help="swap to the disk instead")
    parser.add_argument(
        "--type", type=FsType, choices=list(FsType), metavar="T", help="what the disk must hold"
    )
    parser.add_argument("--format", action="store_true", help="make a file system if the disk is empty")
    parser.add_argument("--root-hash", type=checked(mountchecks.root_hash), metavar="HEX", help="dm-verity")
    parser.add_argument("--hash-serial", metavar="S", help="the disk with the tree of hashes, if another")
    parser.add_argument("--hash-offset", type=_size, default=0, metavar="N", help="where the tree begins")
    parser.add_argument("--upper", type=_path, metavar="DIR", help="where writes to the overlay go")
    parser.add_argument("--work", type=_path, metavar="DIR", help="beside it; default: UPPER.work")
    parser.add_argument(
        "-o",
        "--option",
        type=checked(mountchecks.mount_option),
        action="append",
        default=[],
        metavar="OPT",
        help="of the file system, as mount(8) has it; may be repeated",
    )
    parser.add_argument("--read-only", action="store_true", help="nobody can write to it")
    parser.add_argument(
        "--wait",
        type=patience,
        default=10.0,
        metavar="SECONDS",
        help="for a disk or tag to come, default: %(default)g",
    )
    _add_id(parser)


def _add_kinds(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to mount, one of these")
    kinds = what.add_mutually_exclusive_group(required=True)
    kinds.add_argument("--serial", type=checked(mountchecks.device_name), metavar="S", help="disk, by serial")
    kinds.add_argument(
        "--pci",
        type=checked(mountchecks.pci_path),
        metavar="ADDR",
        help="disk, by PCI address or the slots on the way: 02.1/00.0",
    )
    kinds.add_argument(
        "--virtio",
        type=checked(mountchecks.virtio_name),
        metavar="NAME",
        help="disk, by virtio name: virtio3",
    )
    kinds.add_argument("--device", type=_path, metavar="/dev/NODE", help="disk, by its node in the guest")
    kinds.add_argument(
        "--virtiofs", type=checked(mountchecks.device_name), metavar="TAG", help="shared directory"
    )
    kinds.add_argument(
        "--tmpfs", nargs="?", const=0, type=_size, metavar="SIZE", help="memory, at most so much: 64M"
    )
    kinds.add_argument("--bind", type=_path, metavar="PATH", help="a directory or file of the guest")
    kinds.add_argument(
        "--overlay", type=_layers, metavar="DIR:DIR...", help="layers, the topmost first, as overlay has them"
    )


def _wanted(args: argparse.Namespace) -> MountStorage:
    given = {name: getattr(args, name) for name in _DEVICES if getattr(args, name) is not None}
    device = Device(**{"path" if name == "device" else name: value for name, value in given.items()})
    verity = None
    if args.root_hash is not None:
        hashes = Device(serial=args.hash_serial) if args.hash_serial else None
        verity = Verity(args.root_hash, hashes, args.hash_offset)
    if args.swap and not given:
        raise UsageError("--swap needs a disk: --serial, --pci, --virtio or --device")
    return MountStorage(
        args.id,
        _kind(args),
        target=args.target,
        device=device if given else None,
        fstype=args.type,
        format=Format.ON_FIRST_USE if args.format else Format.NEVER,
        verity=verity,
        tag=args.virtiofs,
        size_bytes=args.tmpfs or None,
        path=args.bind,
        lower=args.overlay or (),
        upper=args.upper,
        work=args.work or (f"{args.upper}.work" if args.upper else None),
        options=tuple(args.option),
        read_only=args.read_only,
        wait_ms=round(args.wait * 1000),
    )


def _kind(args: argparse.Namespace) -> MountKind:
    if args.swap:
        return MountKind.SWAP
    for name in ("virtiofs", "tmpfs", "bind", "overlay"):
        if getattr(args, name) is not None:
            return MountKind(name)
    return MountKind.BLOCK


def _status(state: MountState) -> str:
    flags = [
        "ro" if state.read_only else "",
        f"frozen for {state.frozen_ms / 1000:.0f} s" if state.frozen_ms else "",
        state.problem,
    ]
    more = ", ".join(flag for flag in flags if flag)
    return f"{state.status.value} ({more})" if more else state.status.value


def _add_id(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", type=checked(checks.identifier), metavar="ID")


_path = checked(mountchecks.exact_path)
_size = typed(parse_size)


def _layers(text: str) -> tuple[str, ...]:
    return tuple(_path(part) for part in text.split(":"))
