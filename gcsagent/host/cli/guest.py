"""The commands about the guest as a machine: its clock, its random numbers, its CPUs and memory."""

from __future__ import annotations

import argparse
import os
import socket
from typing import Any

from gcsagent.host import clock as clocks
from gcsagent.host.cli import pressure
from gcsagent.host.cli.argument_types import checked, patience, whole
from gcsagent.host.cli.common import (
    CLIENT_NAME,
    CONNECT_SECONDS,
    UsageError,
    connect,
    print_json,
    print_pairs,
)
from gcsagent.host.cli.declare import Add, add_vm_name
from gcsagent.host.client import Client
from gcsagent.host.clock import ClockOffset
from gcsagent.host.grow import grow
from gcsagent.host.vm.errors import QmpError
from gcsagent.host.vm.named import VmStore
from gcsagent.host.vm.qmp import QmpClient
from protocol import checks
from protocol.address import parse_dial
from protocol.families.agent import ShutdownAction
from protocol.families.guest import MAX_ENTROPY, AddEntropy, ClockChange, Entropy, Online, Resources
from protocol.method import Empty


def add_guest_commands(commands: Any, add: Add) -> None:
    _add_clock(commands, add)
    _add_entropy(commands, add)
    _add_resources(commands, add)
    pressure.add_command(commands, add)
    _add_shutdown(commands, add)


def _add_clock(commands: Any, add: Add) -> None:
    parser = add(
        commands,
        "clock",
        clock,
        "measure the guest's clock against this host's, or set it by that",
        "gcsctl --vm dev clock --set step",
    )
    parser.add_argument(
        "--set",
        type=ClockChange,
        choices=list(ClockChange),
        metavar="step|slew",
        help="step: at once; slew: half a millisecond a second, never backwards",
    )
    parser.add_argument(
        "--samples",
        type=whole(1, 1000),
        default=clocks.SAMPLES,
        metavar="N",
        help="round trips, default: %(default)s",
    )


def _add_entropy(commands: Any, add: Add) -> None:
    parser = add(
        commands,
        "entropy",
        entropy,
        "show the state of the guest's random number generator, or feed it from this host's",
        "gcsctl --vm dev entropy --add 64",
    )
    parser.add_argument(
        "--add",
        type=whole(1, MAX_ENTROPY),
        metavar="BYTES",
        help="this many random bytes, credited, then reseed; 1 to 4096",
    )


def _add_resources(commands: Any, add: Add) -> None:
    add(
        commands,
        "resources",
        resources,
        "show the CPUs and the memory of the guest, plugged in and in use",
        "gcsctl --vm dev resources",
    )
    parser = add(
        commands,
        "online",
        online,
        "put plugged-in CPUs and memory to use; without options all there are",
        "gcsctl --vm dev online --cpus 2-3",
    )
    parser.add_argument(
        "--cpus", type=checked(checks.cpuset), metavar="LIST", help="these, waited for: 2-3,5"
    )
    parser.add_argument(
        "--memory", type=checked(checks.cpuset), metavar="LIST", help="blocks by number, waited for"
    )


def _add_shutdown(commands: Any, add: Add) -> None:
    parser = add(
        commands,
        "shutdown",
        shutdown,
        "stop the containers, unmount, and power the guest off; outside a VM, end the agent",
        "gcsctl --vm dev shutdown --reboot --grace 5",
    )
    parser.add_argument("--reboot", action="store_true", help="begin anew; what launched the VM may end it")
    parser.add_argument(
        "--grace",
        type=patience,
        default=10.0,
        metavar="SECONDS",
        help="between TERM and KILL, default: %(default)g",
    )


def add_vm_grow(vm_commands: Any, add: Add) -> None:
    parser = add(
        vm_commands,
        "grow",
        vm_grow,
        "plug CPUs and memory into a running VM, as far as its --max-cpus and --max-memory go",
        "gcsctl vm grow dev --cpus 1 --memory 512",
    )
    add_vm_name(parser)
    parser.add_argument("--cpus", type=whole(1, 1 << 20), default=0, metavar="N", help="how many more")
    parser.add_argument("--memory", type=whole(1, 1 << 20), default=0, metavar="M", help="how many MiB more")


async def clock(args: argparse.Namespace) -> int:
    async with await connect(args) as client:
        if args.set is None:
            found = await clocks.measure(client, args.samples)
            print_json(found) if args.json else print(describe(found))
            return 0
        done = await clocks.sync(client, args.set, args.samples)
    if args.json:
        print_json(done)
    elif args.set is ClockChange.SLEW:
        print(f"was {describe(done.before)}; the guest slews {_milliseconds(done.after.slewing_ns)}")
    else:
        print(f"was {describe(done.before)}; stepped, now {describe(done.after)}")
    return 0


async def entropy(args: argparse.Namespace) -> int:
    async with await connect(args) as client:
        if args.add is None:
            found: Entropy = await client.call("guest.entropy", Empty())
        else:
            found = await client.call("guest.add_entropy", AddEntropy(os.urandom(args.add)))
    if args.json:
        print_json(found)
        return 0
    available = f"{found.available_bits} of {found.pool_bits} bits"
    print_pairs([("available", available), ("source", found.source or "no hardware generator")])
    return 0


async def resources(args: argparse.Namespace) -> int:
    async with await connect(args) as client:
        found: Resources = await client.call("guest.resources", Empty())
    _show(found, args.json)
    return 0


async def online(args: argparse.Namespace) -> int:
    async with await connect(args) as client:
        found: Resources = await client.call("guest.online", Online(args.cpus, args.memory))
    _show(found, args.json)
    return 0


async def shutdown(args: argparse.Namespace) -> int:
    """Returns once it is under way: soon nobody will be there to answer."""
    action = ShutdownAction.REBOOT if args.reboot else ShutdownAction.POWEROFF
    async with await connect(args) as client:
        await client.shutdown(action, grace=args.grace)
    if args.json:
        print_json({"action": action.value, "grace_ms": round(args.grace * 1000)})
    return 0


async def vm_grow(args: argparse.Namespace) -> int:
    if not args.cpus and not args.memory:
        raise UsageError("nothing to grow by: give --cpus or --memory")
    store = VmStore()
    address, path = parse_dial(store.address(args.name)), store.get(args.name).qmp
    async with await Client.connect(address, timeout=CONNECT_SECONDS, client_name=CLIENT_NAME) as client:
        monitor = await _monitor(path)
        try:
            found = await grow(monitor, client, cpus=args.cpus, memory_mib=args.memory)
        finally:
            monitor.close()
    _show(found, args.json)
    return 0


async def _monitor(path: str) -> QmpClient:
    """The second monitor of a named VM, which takes one at a time."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(path)
        sock.setblocking(False)
        return await QmpClient.open(sock, lambda event: None)
    except OSError as error:
        sock.close()
        raise QmpError(f"QEMU's monitor {path} cannot be reached: {error}") from error
    except BaseException:
        sock.close()
        raise


def _show(found: Resources, as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    cpus, memory = found.cpus, found.memory
    print_pairs(
        [
            ("cpus online", cpus.online or "none"),
            ("cpus present", cpus.present),
            ("cpus possible", cpus.possible),
            ("memory", f"{memory.available_kib} KiB available of {memory.total_kib} KiB"),
            ("blocks", f"of {memory.block_bytes >> 20} MiB, online {memory.online or 'none'}"),
            ("blocks offline", memory.offline or "none"),
            *(("watch " + each.watch, pressure.describe(each)) for each in found.pressure_watches),
        ]
    )


def describe(found: ClockOffset) -> str:
    """Offset ± error, and what it was got from."""
    slewing = f", {_milliseconds(found.slewing_ns)} left to slew" if found.slewing_ns else ""
    error, round_trip = found.error_ns / 1e6, found.round_trip_ns / 1e6
    return (
        f"{_milliseconds(found.offset_ns)} ± {error:.3f} ms"
        f" (best of {found.samples} round trips {round_trip:.3f} ms{slewing})"
    )


def _milliseconds(nanoseconds: int) -> str:
    return f"{nanoseconds / 1e6:+.3f} ms"
