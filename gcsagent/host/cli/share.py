"""gcsctl vm share: directories of this host in a VM that runs."""

from __future__ import annotations

import argparse
from typing import Any

from gcsagent.host import storage
from gcsagent.host.cli.common import (
    CLIENT_NAME,
    CONNECT_SECONDS,
    UsageError,
    print_json,
    print_table,
    since_when,
)
from gcsagent.host.cli.declare import Add, add_group, add_vm_name
from gcsagent.host.cli.vm_options import share
from gcsagent.host.client import Client
from gcsagent.host.vm.found import FoundVm
from gcsagent.host.vm.named import VmStore
from gcsagent.host.vm.share import Share
from protocol.families.storage import MountKind, MountStorage


def add_share_commands(commands: Any, add: Add) -> None:
    """`vm share`, below `vm`."""
    about = "share directories with a running VM, take them away, list them"
    below = add_group(commands, "share", about, "gcsctl vm share add dev ./src:src:ro")
    parser = add(
        below,
        "add",
        share_add,
        "share a directory of this host; prints where the guest has it",
        "gcsctl vm share add dev ./src:src:ro",
    )
    add_vm_name(parser)
    parser.add_argument(
        "share", type=share, metavar="DIR[:TAG][:ro]", help="the tag is DIR's name by default"
    )
    parser.add_argument("--no-mount", action="store_true", help="leave it to `storage mount --virtiofs TAG`")
    parser = add(
        below,
        "rm",
        share_rm,
        "unmount a share, unless somebody uses it, and take it away",
        "gcsctl vm share rm dev src",
    )
    parser.add_argument("--force", action="store_true", help="whoever uses it gets errors from then on")
    add_vm_name(parser)
    parser.add_argument("tag", metavar="TAG")
    parser = add(below, "ls", share_ls, "list a VM's shares", "gcsctl vm share ls dev")
    add_vm_name(parser)


async def share_add(args: argparse.Namespace) -> int:
    wanted: Share = args.share
    path = str(wanted.path.absolute())
    vm = FoundVm.named(args.name)
    await vm.plug_share(wanted)
    if not args.no_mount:
        try:
            await _mount(args.name, wanted)
        except BaseException:
            await vm.unplug_share(wanted.tag)
            raise
    where = None if args.no_mount else wanted.target
    if args.json:
        print_json({"tag": wanted.tag, "path": path, "read_only": wanted.read_only, "target": where})
    else:
        print(where or wanted.tag)
    return 0


async def share_rm(args: argparse.Namespace) -> int:
    if not args.force:
        await _unmount(args.name, args.tag)
    await FoundVm.named(args.name).unplug_share(args.tag)
    if args.json:
        print_json({"tag": args.tag})
    return 0


async def share_ls(args: argparse.Namespace) -> int:
    found = await FoundVm.named(args.name).shares()
    if args.json:
        print_json(found)
        return 0
    rows = [
        (
            each.tag,
            "ro" if each.read_only else "rw",
            since_when(each.removable),
            each.path,
        )
        for each in found
    ]
    print_table(("TAG", "MODE", "REMOVABLE", "DIRECTORY"), rows)
    return 0


async def _connect(name: str) -> Client:
    return await Client.connect(VmStore().address(name), timeout=CONNECT_SECONDS, client_name=CLIENT_NAME)


def _mount_id(tag: str) -> str:
    return f"share-{tag}"


async def _mount(name: str, wanted: Share) -> None:
    mount = MountStorage(
        _mount_id(wanted.tag),
        MountKind.VIRTIOFS,
        tag=wanted.tag,
        target=wanted.target,
        read_only=wanted.read_only,
    )
    async with await _connect(name) as client:
        await storage.mount(client, mount)


async def _unmount(name: str, tag: str) -> None:
    async with await _connect(name) as client:
        found = [
            each
            for each in await storage.list_mounts(client)
            if each.kind is MountKind.VIRTIOFS and each.source == tag
        ]
        for each in found:
            others = [holder for holder in each.holders if holder != _mount_id(tag)]
            if others:
                raise UsageError(
                    f"share {tag} is mounted as {others[0]} at {each.target}: `storage unmount {others[0]}`"
                    " first, or --force"
                )
        for each in found:
            await storage.unmount(client, each.mount)
