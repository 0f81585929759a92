"""gcsctl snapshot: the guest's part, for any VMM; and gcsctl vm snapshot: a VM saved whole, by its keeper."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from gcsagent.host import snapshot
from gcsagent.host.cli.argument_types import identifier, patience
from gcsagent.host.cli.common import complain, connect, print_json, print_table, say
from gcsagent.host.cli.declare import Add, add_group, add_vm_name
from gcsagent.host.cli.guest import describe
from gcsagent.host.cli.parser import EXIT_GCSCTL
from gcsagent.host.cli.processes import age
from gcsagent.host.cli.resources import size
from gcsagent.host.vm import control, snapshotdir
from gcsagent.host.vm.errors import SnapshotError
from gcsagent.host.vm.named import VmStore
from gcsagent.host.vm.saving import MEMORY_SECONDS
from gcsagent.host.vm.snapshotdir import Saved, SnapshotStore

_ANSWER_SECONDS = 2 * MEMORY_SECONDS


def add_snapshot_commands(commands: Any, add: Add) -> None:
    below = add_group(
        commands,
        "snapshot",
        "hold the guest while its VM is copied, and have it go on; `vm snapshot` does all of it",
        "gcsctl --vm dev snapshot prepare nightly",
    )
    parser = add(
        below,
        "prepare",
        prepare,
        "let in nothing new, write the disks, freeze their file systems",
        "gcsctl --vm dev snapshot prepare --hold 30 nightly",
    )
    _add_hold(parser)
    parser.add_argument(
        "--wait",
        type=patience,
        default=snapshot.WAIT_SECONDS,
        metavar="SECONDS",
        help="for requests under way to end, default: %(default)g",
    )
    parser.add_argument("snapshot", type=identifier, metavar="SNAP", help="a name of your own")
    parser = add(
        below,
        "resume",
        resume,
        "go on, with this host's time and random numbers of its own, here or in a copy",
        "gcsctl --vm dev snapshot resume nightly",
    )
    parser.add_argument(
        "--no-machine", action="store_true", help="leave the clock and the random numbers as they are"
    )
    parser.add_argument("snapshot", type=identifier, metavar="SNAP")


def add_vm_snapshot_commands(vm_commands: Any, add: Add) -> None:
    below = add_group(
        vm_commands,
        "snapshot",
        "save a running VM, list and remove what was saved; `vm start --from` makes VMs of it",
        "gcsctl vm snapshot create dev nightly",
    )
    parser = add(
        below,
        "create",
        create,
        "save a VM with its memory and the disks it writes to; it goes on, as its hosts do",
        "gcsctl vm snapshot create dev nightly",
    )
    _add_hold(parser)
    add_vm_name(parser)
    _add_snapshot(parser)
    add(below, "ls", ls, "list snapshots of VMs", "gcsctl vm snapshot ls")
    parser = add(below, "rm", rm, "remove one; VMs made of it go on", "gcsctl vm snapshot rm nightly")
    _add_snapshot(parser)


def _add_hold(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--hold",
        type=patience,
        default=snapshot.HOLD_SECONDS,
        metavar="SECONDS",
        help="the guest goes on by itself then, default: %(default)g",
    )


def _add_snapshot(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("snapshot", metavar="SNAP", help="its name; with a slash, its directory")


async def prepare(args: argparse.Namespace) -> int:
    async with await connect(args) as client:
        held = await snapshot.prepare(client, args.snapshot, hold=args.hold, wait=args.wait)
    if args.json:
        print_json(held)
    else:
        say(f"held for {held.hold_ms / 1000:.0f} s, frozen: {', '.join(held.frozen) or 'nothing'}")
    return 0


async def resume(args: argparse.Namespace) -> int:
    async with await connect(args) as client:
        found = await snapshot.resume(client, args.snapshot, machine=not args.no_machine)
    if args.json:
        print_json(found.done)
        return 0
    how = "goes on" if found.done.held else "had gone on already"
    clock = "" if found.clock is None else f"; clock {describe(found.clock)}"
    say(f"{how}, thawed: {', '.join(found.done.thawed) or 'nothing'}{clock}")
    return 0


async def create(args: argparse.Namespace) -> int:
    directory = SnapshotStore().directory(args.snapshot)
    asked = {"directory": str(directory), "hold": args.hold}
    await control.ask(VmStore().control(args.name), "snapshot-create", asked, _ANSWER_SECONDS)
    saved = Saved.load(directory)
    if args.json:
        print_json(_row(args.snapshot, saved))
    else:
        print(f"{directory}, the guest stood still for {saved.stopped_seconds:.1f} s")
    return 0


async def ls(args: argparse.Namespace) -> int:
    store = SnapshotStore()
    damaged: list[SnapshotError] = []
    found = [_row(name, saved) for name, saved in store.list(damaged.append)]
    for error in damaged:
        complain(error)
    code = EXIT_GCSCTL if damaged else 0
    if args.json:
        print_json(found)
        return code
    rows = [
        (each["snapshot"], each["vm"], age(int(each["created"] * 1e9)), size(each["size_bytes"]))
        for each in found
    ]
    print_table(("SNAPSHOT", "VM", "AGE", "SIZE"), rows)
    return code


async def rm(args: argparse.Namespace) -> int:
    SnapshotStore().remove(args.snapshot)
    if args.json:
        print_json({"snapshot": args.snapshot})
    return 0


def _row(name: str, saved: Saved) -> dict[str, Any]:
    directory = SnapshotStore().directory(name)
    return {
        "snapshot": name,
        "vm": saved.vm,
        "directory": str(directory),
        "created": saved.created,
        "size_bytes": snapshotdir.size(directory),
        "stopped_seconds": saved.stopped_seconds,
        "accel": saved.accel,
        "disks": [asdict(disk) for disk in saved.disks],
    }
