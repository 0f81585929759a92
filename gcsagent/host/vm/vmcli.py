"""The `vm` part of gcsctl: argument parsing, and what start, stop, ls and console print.

`add_vm_parser` wires the subcommands; each sets `handler` to a coroutine function that takes the parsed
arguments and returns the exit code. Errors are `VmError`s, for the caller to print. `run_in_vm` is the
frame of `vm run`: what runs inside is the caller's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from gcsagent.host import network
from gcsagent.host.client import Client
from gcsagent.host.forwards import Wanted
from gcsagent.host.vm import consolelog, starter
from gcsagent.host.vm.config import DEFAULT_CPUS, DEFAULT_MEMORY_MIB, VmConfig
from gcsagent.host.vm.console import LineSplitter
from gcsagent.host.vm.disk import Disk
from gcsagent.host.vm.errors import Interrupted, InvalidVmConfig, VmError, VmNotFound
from gcsagent.host.vm.launcher import Progress, VirtualMachine
from gcsagent.host.vm.named import NamedVm, VmStore
from gcsagent.host.vm.nic import NETWORKS
from gcsagent.host.vm.process import open_pidfd
from gcsagent.host.vm.share import Share
from gcsagent.host.vm.snapshotdir import SnapshotStore
from gcsagent.host.vm.timeline import Moment
from gcsagent.host.vm.timeline import table as table_of_stages

T = TypeVar("T")

# After the caller's work is done a guest has nothing left to save: its disks are read-only.
_POWERDOWN_SECONDS = 15.0

_LAST_GASP_SECONDS = 1.0


def add_vm_parser(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser],
    add: Callable[..., argparse.ArgumentParser],
) -> argparse._SubParsersAction[argparse.ArgumentParser]:
    """Adds `vm` with start, stop, ls and console; returns its subparsers, for `run` to be added."""
    about = "boot, list and stop virtual machines"
    example = "example: gcsctl vm start dev --rootfs ./rootfs; gcsctl --vm dev ps"
    vm = subparsers.add_parser("vm", help=about, description=about, epilog=example)
    commands = vm.add_subparsers(metavar="COMMAND", required=True)
    start = add(
        commands,
        "start",
        vm_start,
        "boot a VM that keeps running in the background; prints its agent's address",
        "gcsctl vm start dev --rootfs ./rootfs --memory 512 --share ./src:ro --forward 8080:web:80",
    )
    start.add_argument("name", metavar="NAME")
    add_vm_options(start)
    start.add_argument("-v", "--verbose", action="store_true", help="show what the start took its time for")
    start.add_argument(
        "--from",
        dest="snapshot",
        metavar="SNAP",
        help="go on from this `vm snapshot` instead of booting; what the guest has comes with it",
    )
    stop = add(commands, "stop", vm_stop, "power a VM down and forget it", "gcsctl vm stop dev")
    stop.add_argument("name", metavar="NAME")
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
    console.add_argument("name", metavar="NAME")
    console.add_argument("-f", "--follow", action="store_true", help="go on until the VM ends")
    return commands


def add_vm_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that describe a VM, as `config_from_args` reads them."""
    parser.add_argument(
        "--memory", type=int, default=DEFAULT_MEMORY_MIB, metavar="M", help="MiB (default: %(default)s)"
    )
    parser.add_argument("--cpus", type=int, default=DEFAULT_CPUS, metavar="N", help="default: %(default)s")
    parser.add_argument("--max-cpus", type=int, metavar="N", help="what `vm grow` can bring them to")
    parser.add_argument("--max-memory", type=int, metavar="M", help="MiB that `vm grow` can bring it to")
    parser.add_argument(
        "--guest-image",
        type=Path,
        metavar="DIR",
        help="what the VM boots (default: GCS_IMAGE, else the built one)",
    )
    parser.add_argument(
        "--kernel",
        type=Path,
        metavar="FILE",
        help="another kernel than the guest image's: of the same version, or with virtio and vsock built in",
    )
    parser.add_argument(
        "--rootfs", type=Path, metavar="DIR|FILE", help="root file system for containers, read-only"
    )
    parser.add_argument(
        "--disk",
        type=disk,
        action="append",
        default=[],
        metavar="FILE[:NAME][:ro]",
        help="a raw image or block device, for `storage mount --serial NAME`; NAME is its name by default;"
        " may be repeated",
    )
    parser.add_argument(
        "--share",
        type=share,
        action="append",
        default=[],
        metavar="DIR[:TAG][:ro]",
        help="share a directory, mounted at /run/gcs/shares/TAG; TAG is its name by default; may be repeated",
    )
    parser.add_argument(
        "--forward",
        type=_forward,
        action="append",
        default=[],
        metavar="[ADDR:]PORT:ID:PORT",
        help="as `gcsctl forward` has it, while the VM runs; `vm ls --json` shows them; may be repeated",
    )
    parser.add_argument(
        "--net",
        choices=NETWORKS,
        default="none",
        help="user: a network card that reaches what this host reaches, configured; default: %(default)s",
    )
    parser.add_argument("--mac", metavar="MAC", help="of that card; default: a random one")
    parser.add_argument(
        "--accel", choices=("auto", "kvm", "tcg"), default="auto", help="default: %(default)s"
    )
    parser.add_argument(
        "--vsock", choices=("auto", "vhost", "vhost-user"), default="auto", help="default: %(default)s"
    )
    parser.add_argument(
        "--boot-timeout", type=float, metavar="S", help="seconds (default: 60 under KVM, 180 under TCG)"
    )
    parser.add_argument(
        "--shell", action="store_true", help="allow `gcsctl shell`, also while the agent does not answer"
    )
    parser.add_argument(
        "--append", action="append", default=[], metavar="WORD", help="add to the kernel command line"
    )


def config_from_args(args: argparse.Namespace) -> VmConfig:
    """The VM that the options of `add_vm_options` describe.

    Raises:
        InvalidVmConfig: a value cannot be used.
    """
    return VmConfig(
        memory_mib=args.memory,
        cpus=args.cpus,
        image=args.guest_image,
        kernel=args.kernel,
        rootfs=args.rootfs,
        disks=tuple(args.disk),
        shares=tuple(args.share),
        forwards=tuple(args.forward),
        cmdline=tuple(args.append),
        shell=args.shell,
        net=args.net,
        mac=args.mac,
        accel=args.accel,
        vsock=args.vsock,
        boot_timeout=args.boot_timeout,
        max_cpus=args.max_cpus,
        max_memory_mib=args.max_memory,
    )


def disk(text: str) -> Disk:
    """``FILE[:NAME][:ro]``. Raises ArgumentTypeError."""
    return _parsed(Disk.parse, text)


def share(text: str) -> Share:
    """``DIR[:TAG][:ro]``. Raises ArgumentTypeError."""
    return _parsed(Share.parse, text)


def _forward(text: str) -> str:
    try:
        Wanted.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None
    return text


def _parsed(parse: Callable[[str], T], text: str) -> T:
    try:
        return parse(text)
    except InvalidVmConfig as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def vm_monitor(name: str) -> str:
    """Where the named VM's QEMU monitor listens.

    Raises:
        VmNotFound, VmNotRunning: there is none.
    """
    store = VmStore()
    store.address(name)  # refuses a VM that does not run
    return store.get(name).qmp


def print_progress(text: str) -> None:
    """Progress goes to standard error: standard output belongs to results."""
    print(text, file=sys.stderr, flush=True)


async def run_in_vm(
    config: VmConfig, body: Callable[[VirtualMachine], Awaitable[T]], *, progress: Progress = print_progress
) -> T:
    """Boots a VM, runs `body` with it, powers it off, and returns what `body` returned.

    Raises:
        VmError: the VM did not boot, or ended while `body` ran (which is then cancelled).
        Interrupted: SIGTERM or SIGHUP came; the VM is gone by then.
    """
    with ending_on_signals():
        async with await VirtualMachine.launch(config, progress=progress) as vm:
            result = await _unless_it_ends(vm, body)
            await vm.powerdown(_POWERDOWN_SECONDS)
            return result


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """Turns SIGTERM and SIGHUP into an orderly end of the current task, so that clean-up runs.

    Raises:
        Interrupted: one of them came.
    """
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None
    received: list[int] = []

    def on_signal(signum: int) -> None:
        received.append(signum)
        task.cancel()

    for signum in (signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(signum, on_signal, signum)
    try:
        yield
    except asyncio.CancelledError:
        if not received:
            raise
        raise Interrupted(received[0]) from None
    finally:
        for signum in (signal.SIGTERM, signal.SIGHUP):
            loop.remove_signal_handler(signum)


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
    vms = VmStore().list()
    if args.json:
        print(json.dumps([vm.to_json() for vm in vms], indent=1))
    else:
        print("\n".join(table(vms, time.time())))
    return 0


def table(vms: list[NamedVm], now: float) -> list[str]:
    """The lines of `vm ls`."""
    rows = [("NAME", "STATE", "PID", "AGE", "ACCEL", "ADDRESS")]
    for vm in vms:
        accel = (vm.accel or "-").partition(" ")[0]
        detail = vm.address if vm.state == "running" else vm.reason
        rows.append(
            (vm.name, vm.state, str(vm.qemu_pid or "-"), _age(now - vm.created), accel, detail or "-")
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    return ["  ".join([*map(str.ljust, row, widths), row[-1]]) for row in rows]


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


async def _unless_it_ends(vm: VirtualMachine, body: Callable[[VirtualMachine], Awaitable[T]]) -> T:
    working = asyncio.ensure_future(body(vm))
    ending = asyncio.create_task(vm.wait())
    try:
        await asyncio.wait((working, ending), return_when=asyncio.FIRST_COMPLETED)
        failed = working.done() and working.exception() is not None
        if failed:
            # A dying VM breaks the connection before QEMU has exited: its end explains the failure better.
            await asyncio.wait((ending,), timeout=_LAST_GASP_SECONDS)
        if working.done() and not (failed and ending.done()):
            return working.result()
        raise VmError(f"the VM ended while in use: {ending.result().reason}")
    finally:
        for task in (working, ending):
            task.cancel()
        await asyncio.gather(working, ending, return_exceptions=True)


def _age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{int(seconds // size)}{unit}"
    return f"{max(0, int(seconds))}s"
