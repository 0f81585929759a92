"""``gcsctl pressure``: shows when processes wait too long for memory, a CPU or a disk."""

from __future__ import annotations

import argparse
import contextlib
import secrets
from typing import Any

from gcsagent.host.cli.argument_types import between, identifier
from gcsagent.host.cli.common import connect, print_json
from gcsagent.host.cli.declare import Add
from gcsagent.host.client import Client
from gcsagent.host.errors import HostError
from gcsagent.host.text import printable
from protocol.errors import RpcError
from protocol.families.guest import PressureKind, PressureRef, PressureResource, WatchPressure

_MILLISECONDS = between(0.001, 10_000, "milliseconds")


def add_command(commands: Any, add: Add) -> None:
    parser = add(
        commands,
        "pressure",
        pressure,
        "tell, until interrupted, when a container's processes, or all, wait too long",
        "gcsctl pressure --stall 150 --window 2000 web",
    )
    parser.add_argument(
        "--resource", type=PressureResource, choices=list(PressureResource), default=PressureResource.MEMORY
    )
    parser.add_argument("--full", action="store_true", help="all of them at once, not just some")
    parser.add_argument(
        "--stall",
        type=_MILLISECONDS,
        default=150.0,
        metavar="MS",
        help="so much waiting, default: %(default)g",
    )
    parser.add_argument(
        "--window",
        type=_MILLISECONDS,
        default=1000.0,
        metavar="MS",
        help="in so much time, default: %(default)g",
    )
    parser.add_argument("id", nargs="?", type=identifier, metavar="ID")


async def pressure(args: argparse.Namespace) -> int:
    """The watch is this command's own, and goes with it."""
    kind = PressureKind.FULL if args.full else PressureKind.SOME
    stall, window = round(args.stall * 1000), round(args.window * 1000)
    wanted = WatchPressure(
        f"gcsctl-{secrets.token_hex(4)}", args.resource, kind, stall, window, container=args.id
    )
    async with await connect(args) as client, await client.events() as events:
        await client.call("guest.watch_pressure", wanted)
        try:
            async for event in events:
                if event.type.endswith(".pressure") and event.data.get("watch") == wanted.watch:
                    _show(event.data, args.json)
                elif event.type == "container.deleted" and args.id and event.container == args.id:
                    break
        finally:
            await _end(client, wanted.watch)
    return 0


async def _end(client: Client, watch: str) -> None:
    with contextlib.suppress(RpcError, HostError):  # gone with its container, or its agent
        await client.call("guest.unwatch_pressure", PressureRef(watch))


def _show(data: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(data, indent=None)
        return
    numbers = (f"{name}={data[name]}" for name in sorted(data) if "_avg" in name)
    print(printable(" ".join((str(data.get("kind")), *numbers))), flush=True)


def describe(watch: WatchPressure) -> str:
    whose = f" in {watch.container}" if watch.container else ""
    return (
        f"{watch.resource.value}, {watch.kind.value},"
        f" {watch.stall_us / 1000:g} ms in {watch.window_us / 1000:g} ms{whose}"
    )
