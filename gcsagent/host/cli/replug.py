"""gcsctl vm replug: the vsock device of a VM that runs, with a fresh daemon behind it."""

from __future__ import annotations

import argparse
from typing import Any

from gcsagent.host.cli.argument_types import interval
from gcsagent.host.cli.common import CLIENT_NAME, print_json
from gcsagent.host.cli.declare import Add, add_vm_name
from gcsagent.host.client import Client
from gcsagent.host.vm.found import FoundVm

_AGENT_SECONDS = 30.0
"""The guest finds its new device in about a second; its agent has been listening all along."""


def add_replug_command(commands: Any, add: Add) -> None:
    """`vm replug`, below `vm`."""
    parser = add(
        commands,
        "replug",
        vm_replug,
        "unplug a VM's vsock device and plug it in again: mends a VM whose daemon hangs; containers run on",
        "gcsctl vm replug dev",
    )
    add_vm_name(parser)
    parser.add_argument(
        "--timeout",
        type=interval,
        default=60.0,
        metavar="SECONDS",
        help="for the guest to let go of it, default: %(default)g",
    )
    parser.add_argument("--no-wait", action="store_true", help="return before the agent answers again")


async def vm_replug(args: argparse.Namespace) -> int:
    """Raises VmError, and ConnectFailed when the agent does not answer again."""
    vm = FoundVm.named(args.name)
    await vm.replug_vsock(args.timeout)
    if not args.no_wait:
        client = await Client.connect(vm.address, timeout=_AGENT_SECONDS, client_name=CLIENT_NAME)
        await client.aclose()
    if args.json:
        print_json({"name": args.name, "address": vm.address, "daemon_pid": vm.record.daemon_pid})
    else:
        print(f"{args.name}: plugged in again" + ("" if args.no_wait else ", and its agent answers"))
    return 0
