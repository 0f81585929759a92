"""`vm start`, `stop`, `ls` and `console`. Errors are `VmError`s, for the caller to print."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from gcsagent.host import network
from gcsagent.host.cli.common import columns, complain
from gcsagent.host.cli.declare import Add, add_group, add_vm_name
from gcsagent.host.cli.parser import EXIT_GCSCTL
from gcsagent.host.cli.processes import span
from gcsagent.host.cli.vm_options import add_vm_options, config_from_args
from gcsagent.host.client import Client
from gcsagent.host.vm import consolelog, starter
from gcsagent.host.vm.console import LineSplitter
from gcsagent.host.vm.errors import VmError, VmNotFound
from gcsagent.host.vm.named import NamedVm, VmStore
from gcsagent.host.vm.process import open_pidfd
from gcsagent.host.vm.running import ending_on_signals
from gcsagent.host.vm.snapshotdir import SnapshotStore
from gcsagent.host.vm.timeline import Moment
from gcsagent.host.vm.timeline import table as table_of_stages


def add_vm_parser(subparsers: Any, add: Add) -> Any:
    """Adds `vm` with start, stop, ls and console; returns its subparsers, for `run` to be added."""
    commands = add_group(
        subparsers,
        "vm",
        "boot, list and stop virtual machines",
        "gcsctl vm start dev --rootfs ./rootfs; gcsctl --vm dev ps",
    )
    start = add(
        commands,
        "start",
        vm_start,
        "boot a VM that keeps running in the background; prints its agent's address",
        "gcsctl vm start dev --rootfs ./rootfs --memory 512 --share ./src:ro --forward 8080:web:80",
    )
    add_vm_name(start)
    add_vm_options(start)
    start.add_argument("-v", "--verbose", action="store_true", help="show what the start took its time for")
    start.add_argument(
        "--from",
        dest="snapshot",
        metavar="SNAP",
        help="go on from this `vm snapshot` instead of booting; what the guest has comes with it",
    )
    stop = add(commands, "stop", vm_stop, "power a VM down and forget it", "gcsctl vm stop dev")
    add_vm_name(stop)
    stop.add_argument(
        "--timeout", type=float, default=30.0, metavar="S", help="seconds until it is killed (default: 30)"
    )
    add(commands, "ls", vm_ls, "list VMs", "gcsctl vm ls --json")
    console = add(
        commands,
        "console",
        vm_console,
        "show what a VM wrote to its serial console",
        "gcsctl vm console dev -f",
    )
    add_vm_name(console)
    console.add_argument("-f", "--follow", action="store_true", help="go on until the VM ends")
    return commands


def print_progress(text: str) -> None:
    """Progress goes to standard error: standard output belongs to results."""
    print(text, file=sys.stderr, flush=True)


async def vm_start(args: argparse.Namespace) -> int:
    """`vm start NAME`: prints the agent's address once the VM is ready."""
    with ending_on_signals():
        config = config_from_args(args)
        if args.snapshot is not None:
            config = replace(config, snapshot=SnapshotStore().directory(args.snapshot))
        vm = await starter.start(VmStore(), args.name, config, progress=print_progress)
        if args.snapshot is None and vm.mac is not None and vm.address is not None:
            # A failure leaves the VM as it is: it runs, and `gcsctl network set` can be tried again.
            async with await Client.connect(vm.address) as client:
                await network.use_user_network(client, vm.mac)
    if args.verbose:
        print_progress("\n".join(table_of_stages([Moment(*pair) for pair in vm.boot])))
    print(json.dumps(vm.to_json()) if args.json else vm.address)
    return 0


async def vm_stop(args: argparse.Namespace) -> int:
    """`vm stop NAME`."""
    vm = await VmStore().stop(args.name, args.timeout)
    if args.json:
        print(json.dumps({"name": vm.name, "state": "stopped"}))
    return 0


async def vm_ls(args: argparse.Namespace) -> int:
    """`vm ls`."""
    damaged: list[VmError] = []
    vms = VmStore().list(damaged.append)
    for error in damaged:
        complain(error)
    if args.json:
        print(json.dumps([vm.to_json() for vm in vms], indent=1))
    else:
        print("\n".join(table(vms, time.time())))
    return EXIT_GCSCTL if damaged else 0


def table(vms: list[NamedVm], now: float) -> list[str]:
    """The lines of `vm ls`."""
    rows = [("NAME", "STATE", "PID", "AGE", "ACCEL", "ADDRESS")]
    for vm in vms:
        accel = (vm.accel or "-").partition(" ")[0]
        detail = vm.address if vm.state == "running" else vm.reason
        rows.append(
            (vm.name, vm.state, str(vm.qemu_pid or "-"), span(now - vm.created), accel, detail or "-")
        )
    return columns(rows)


async def vm_console(args: argparse.Namespace) -> int:
    """`vm console NAME`: the console so far, or as it grows; what a terminal might obey is escaped.

    With --json one document per line of it.
    """

    def show(line: str) -> None:
        print(json.dumps({"line": line}) if args.json else line)

    vm = VmStore().get(args.name)
    lines = LineSplitter()
    try:
        async for data in _console(vm, follow=args.follow):
            for line in lines.feed(data):
                show(line)
            sys.stdout.flush()
    except FileNotFoundError:
        raise VmNotFound(f"VM {args.name!r} has no console yet") from None
    for line in lines.flush():
        show(line)
    return 0


async def _console(vm: NamedVm, *, follow: bool) -> AsyncIterator[bytes]:
    path = Path(vm.console)
    pidfd = open_pidfd(vm.keeper_pid, vm.keeper_started) if follow else None
    if pidfd is None:
        yield consolelog.read_log(path)
        return
    loop = asyncio.get_running_loop()
    gone: asyncio.Future[None] = loop.create_future()

    def on_exit() -> None:
        loop.remove_reader(pidfd)
        gone.set_result(None)

    loop.add_reader(pidfd, on_exit)
    try:
        async for data in consolelog.follow(path, gone):
            yield data
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)
