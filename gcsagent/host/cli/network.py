"""The commands about networks: of the guest, or with --container of a container."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from gcsagent.host import network
from gcsagent.host.cli.argument_types import checked
from gcsagent.host.cli.common import UsageError, connect, print_json, print_table, say, since_when
from gcsagent.host.cli.declare import Add, add_group, add_vm_name
from gcsagent.host.vm.found import FoundVm
from protocol import checks, netchecks
from protocol.families.network import (
    Applied,
    ApplyNetwork,
    AttachNetwork,
    Interface,
    NetworkState,
    Route,
    RouteState,
)
from protocol.pods import Dns
from protocol.schema import SchemaError, from_wire

MAX_FILE = 1 << 20


def add_network_commands(commands: Any, add: Add) -> None:
    parts = add_group(
        commands, "network", "show and configure the networks of guest and containers", "gcsctl network show"
    )
    parser = add(
        parts, "show", show, "show interfaces, addresses and routes", "gcsctl network show --container web"
    )
    _add_container(parser)
    _add_set(add(parts, "set", set_, "configure one interface, moving it there if need be", _SET_EXAMPLE))
    parser = add(
        parts,
        "apply",
        apply,
        "make a network what a file says: the arguments of network.apply, as JSON",
        "gcsctl network apply --container web net.json",
    )
    _add_container(parser)
    parser.add_argument("file", metavar="FILE", help="- is standard input")
    _add_attach(
        add(
            parts,
            "attach",
            attach,
            "give a container an interface on a bridge in the guest, with an address of its own",
            "gcsctl network attach web",
        )
    )
    parser = add(
        parts,
        "remove",
        remove,
        "remove an interface that was made; a device goes back to the guest",
        "gcsctl network remove --container web eth0",
    )
    _add_container(parser)
    parser.add_argument("interface", type=checked(netchecks.ifname), metavar="NAME")


def add_nic_commands(commands: Any, add: Add) -> None:
    """`vm net`, below `vm`."""
    below = add_group(
        commands, "net", "plug network cards into a running VM, unplug and list them", "gcsctl vm net add dev"
    )
    parser = add(
        below,
        "add",
        nic_add,
        "plug in a card that reaches what this host reaches; prints its address for `network set --mac`",
        "gcsctl vm net add dev",
    )
    add_vm_name(parser)
    parser.add_argument("--mac", type=checked(netchecks.mac), metavar="MAC", help="default: a random one")
    parser = add(below, "rm", nic_rm, "unplug a card", "gcsctl vm net rm dev 52:54:00:12:34:56")
    add_vm_name(parser)
    parser.add_argument("mac", type=checked(netchecks.mac), metavar="MAC")
    parser = add(below, "ls", nic_ls, "list a VM's network cards", "gcsctl vm net ls dev")
    add_vm_name(parser)


_SET_EXAMPLE = (
    "gcsctl network set eth0 --mac 52:54:00:12:34:56 --address 10.0.2.15/24 --gateway 10.0.2.2 --dns 10.0.2.3"
)


def _add_container(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--container", type=checked(checks.identifier), metavar="ID", help="its network, not the guest's"
    )


def _add_set(parser: argparse.ArgumentParser) -> None:
    _add_container(parser)
    parser.add_argument("interface", type=checked(netchecks.ifname), metavar="NAME")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--mac", type=checked(netchecks.mac), metavar="MAC", help="the card with this address")
    which.add_argument(
        "--device", type=checked(netchecks.ifname), metavar="DEV", help="the guest's interface of this name"
    )
    many = (
        (
            "--address",
            "addresses",
            netchecks.interface_address,
            "ADDR/N",
            "all it shall have; may be repeated",
        ),
        ("--gateway", "gateways", checks.ip_address, "ADDR", "for the default route; one a family"),
        ("--dns", "dns", checks.ip_address, "ADDR", "a name server; may be repeated"),
    )
    for option, dest, check, metavar, help_ in many:
        # Not `address`, which is the agent's.
        parser.add_argument(
            option, dest=dest, type=checked(check), action="append", default=[], metavar=metavar, help=help_
        )
    parser.add_argument("--mtu", type=int, metavar="BYTES")
    parser.add_argument("--down", action="store_true", help="leave it down")
    parser.add_argument(
        "--wait", type=float, default=0.0, metavar="S", help="seconds to wait for it to be plugged in"
    )


def _add_attach(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", type=checked(checks.identifier), metavar="ID")
    parser.add_argument("--name", type=checked(netchecks.ifname), default="eth0", help="default: %(default)s")
    parser.add_argument(
        "--bridge", type=checked(netchecks.ifname), default="gcs0", help="default: %(default)s"
    )
    parser.add_argument(
        "--subnet",
        type=checked(netchecks.subnet),
        action="append",
        default=[],
        metavar="NET/N",
        help=f"of the bridge; one a family, default: {AttachNetwork('x').subnets[0]}",
    )
    parser.add_argument("--no-masquerade", action="store_true", help="reach only the guest and each other")


# -- the commands ---------------------------------------------------------------------------------


async def show(args: argparse.Namespace) -> int:
    async with await connect(args) as client:
        found = await network.state(client, args.container)
    if args.json:
        print_json(found)
    else:
        _print_state(found)
    return 0


async def set_(args: argparse.Namespace) -> int:
    interface = Interface(
        args.interface,
        mac=args.mac,
        device=args.device,
        addresses=tuple(args.addresses) or None,
        mtu=args.mtu,
        up=not args.down,
    )
    routes = tuple(Route("default", gateway, args.interface) for gateway in args.gateways)
    params = ApplyNetwork(
        args.container,
        (interface,),
        routes=routes or None,
        dns=Dns(tuple(args.dns)) if args.dns else None,
        wait_ms=round(args.wait * 1000),
    )
    return await _apply(args, params)


async def apply(args: argparse.Namespace) -> int:
    return await _apply(args, _read(args.file, args.container))


async def _apply(args: argparse.Namespace, params: ApplyNetwork) -> int:
    async with await connect(args) as client:
        done = await network.apply(client, params)
    if args.json:
        print_json(done)
    else:
        _print_changes(done)
    return 0


async def attach(args: argparse.Namespace) -> int:
    chosen = {"subnets": tuple(args.subnet)} if args.subnet else {}
    params = AttachNetwork(args.id, args.name, args.bridge, masquerade=not args.no_masquerade, **chosen)
    async with await connect(args) as client:
        found = await network.attach(client, params)
    if args.json:
        print_json(found)
    else:
        say(f"{found.interface.name} {', '.join(found.interface.addresses)}")
    return 0


async def remove(args: argparse.Namespace) -> int:
    async with await connect(args) as client:
        await network.remove(client, args.interface, args.container)
    if args.json:
        print_json({"removed": args.interface, "container": args.container})
    return 0


async def nic_add(args: argparse.Namespace) -> int:
    mac = await FoundVm.named(args.name).plug_nic(args.mac)
    print_json({"mac": mac}) if args.json else print(mac)
    return 0


async def nic_rm(args: argparse.Namespace) -> int:
    await FoundVm.named(args.name).unplug_nic(args.mac)
    if args.json:
        print_json({"mac": args.mac})
    return 0


async def nic_ls(args: argparse.Namespace) -> int:
    found = await FoundVm.named(args.name).nics()
    if args.json:
        print_json(found)
    else:
        print_table(
            ("MAC", "REMOVABLE"),
            [(each.mac, since_when(each.removable)) for each in found],
        )
    return 0


# -- in and out -----------------------------------------------------------------------------------


def _read(path: str, container: str | None) -> ApplyNetwork:
    try:
        with sys.stdin.buffer if path == "-" else Path(path).open("rb") as file:
            data = json.loads(file.read(MAX_FILE))
        if isinstance(data, dict) and container is not None:
            data["container"] = container
        return from_wire(ApplyNetwork, data)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    except (ValueError, SchemaError, RecursionError) as error:
        raise UsageError(f"{path}: {error}") from error


def _print_state(found: NetworkState) -> None:
    rows = [
        (
            each.name,
            "up" if each.up and each.running else "no carrier" if each.up else "down",
            each.mac,
            each.mtu,
            each.master,
            " ".join(each.addresses),
        )
        for each in found.interfaces
    ]
    print_table(("NAME", "STATE", "MAC", "MTU", "BRIDGE", "ADDRESSES"), rows)
    for route in found.routes:
        say(f"route {describe_route(route)}")
    for each in found.neighbours:
        say(f"neighbour {each.address} is {each.mac} on {each.interface}")
    if found.dns.nameservers:
        say(f"dns {' '.join(found.dns.nameservers)}")
    if found.masquerade:
        say(f"masquerade {' '.join(found.masquerade)}")


def describe_route(route: RouteState) -> str:
    """As ``ip route`` has it."""
    words = [route.to, *(["via", route.via] if route.via else []), "dev", route.interface]
    words += ["src", route.source] if route.source else []
    words += ["metric", str(route.metric)] if route.metric else []
    return " ".join([*words, *(["onlink"] if route.onlink else [])])


def _print_changes(done: Applied) -> None:
    for change in done.changes or ("nothing to change",):
        say(change)
