"""What the commands share: the agent they talk to, and how results are shown."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from gcsagent.host.cli.colour import Colour, paint
from gcsagent.host.client import Client
from gcsagent.host.errors import HostError
from gcsagent.host.text import jsonable, printable
from gcsagent.host.transport import Address
from protocol.address import UnixAddress, VsockAddress, parse_dial
from protocol.types import ExitRecord, Oom, OomScope, Reason

CONNECT_SECONDS = 10.0
"""How long a command waits for the agent; booting VMs are waited for by `vm start` and `vm run`."""

PATIENCE_SECONDS = 60.0
"""How long for one that was there: a stuck agent is given 20 s before it is restarted (its watchdog's)."""

CLIENT_NAME = "gcsctl"


class UsageError(HostError):
    """The command line cannot be carried out."""


def agent_address(args: argparse.Namespace) -> Address:
    """Where the agent is, from --vm, --address or GCS_ADDRESS. Raises UsageError, VmError."""
    if args.vm and args.address:
        raise UsageError("give --vm or --address, not both")
    text = args.address or os.environ.get("GCS_ADDRESS")
    if args.vm:
        from gcsagent.host.vm.named import VmStore

        text = VmStore().address(args.vm)
    if not text:
        raise UsageError("no agent to talk to: give --address ADDRESS or --vm NAME, or set GCS_ADDRESS")
    try:
        return parse_dial(text)
    except ValueError as error:
        raise UsageError(str(error)) from error


async def connect(args: argparse.Namespace) -> Client:
    """A client for the agent the command line names.

    Raises UsageError when there is no such socket: an agent that is restarted, or a VM that boots, has one.
    Only ``--wait`` waits for it.
    """
    address = agent_address(args)
    if args.wait_for_agent is None:
        _must_be_there(address)
    return await Client.connect(
        address,
        timeout=CONNECT_SECONDS if args.wait_for_agent is None else args.wait_for_agent,
        patience=PATIENCE_SECONDS,
        client_name=CLIENT_NAME,
    )


def _must_be_there(address: Address) -> None:
    if isinstance(address, VsockAddress):
        return
    try:
        os.stat(address.path)
    except FileNotFoundError:
        what = (
            f"start one with `gcsagent --listen {address}`"
            if isinstance(address, UnixAddress)
            else "`gcsctl vm ls` lists VMs"
        )
        raise UsageError(f"{address}: there is no such socket; {what}, or --wait for it") from None
    except OSError:
        pass  # connect has the words for it


def exit_code(record: ExitRecord) -> int:
    """The process's exit code as ours; what no process can have (a lying guest) becomes 255."""
    return record.exit_code if 0 <= record.exit_code <= 255 else 255


def print_json(value: Any, *, to_stderr: bool = False, indent: int | None = 1) -> None:
    print(
        json.dumps(jsonable(value), indent=indent), file=sys.stderr if to_stderr else sys.stdout, flush=True
    )


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    heading, *lines = columns([header, *([printable(cell, 200) or "-" for cell in row] for row in rows)])
    print("\n".join([paint(heading, Colour.BOLD, sys.stdout), *lines]))


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Left-aligned; the last one is as long as it is."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    return ["  ".join([*map(str.ljust, row, widths), row[-1]]) for row in rows]


def print_pairs(pairs: Sequence[tuple[str, object]]) -> None:
    """``name: value`` lines, the values under each other; one without a name goes on with the one above."""
    width = max(len(name) for name, _ in pairs) + 1
    for name, value in pairs:
        print(f"{name + ':' if name else '':<{width}} {printable(value)}")


def say(text: object) -> None:
    """One line on stdout, of what a guest may have a part in."""
    print(printable(text), flush=True)


def complain(text: object) -> None:
    """One line on stderr."""
    print(paint("gcsctl:", Colour.RED, sys.stderr), printable(text), file=sys.stderr, flush=True)


def when(time_ns: int, *, milliseconds: bool = False) -> str:
    """Nanoseconds since the epoch as UTC."""
    try:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(time_ns // 10**9))
    except (ValueError, OverflowError, OSError):  # a guest may say anything
        return "?"
    return f"{stamp}.{time_ns // 10**6 % 1000:03d}Z" if milliseconds else f"{stamp}Z"


def report_oom(record: ExitRecord, who: str) -> None:
    """One line on stderr when the kernel killed it, or others in its container, for want of memory."""
    oom = record.oom
    if oom is None:
        return
    killed = f"{who} was killed" if record.reason is Reason.OOM else f"processes of {who} were killed"
    complain(f"{killed} for want of memory: {describe_oom(oom)}")


def describe_oom(oom: Oom) -> str:
    """Whose memory it was, how many were killed, and which."""
    whose = {
        OomScope.CONTAINER: f"the limit of {oom.limit_cgroup or oom.cgroup} was reached",
        OomScope.ANCESTOR: f"the limit of {oom.limit_cgroup or 'a cgroup above'} was reached",
        OomScope.MACHINE: "the whole guest ran out",
    }.get(oom.scope, f"in {oom.cgroup}")
    names = [f"{each.process or each.command or 'a process'} (pid {each.pid})" for each in oom.victims]
    which = f": {', '.join(names)}" if names else ""
    return f"{whose}; {oom.new} killed{which}" + (f", {oom.kills} so far" if oom.kills > oom.new else "")


def since_when(removable: bool) -> str:
    """A device of a VM: what was plugged in can be taken out."""
    return "plugged" if removable else "since boot"
