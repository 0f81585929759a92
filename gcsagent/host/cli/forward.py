"""``gcsctl forward``: local sockets that lead to what listens in the guest or in a container."""

from __future__ import annotations

import argparse
import asyncio
import signal
import socket
from collections.abc import Callable
from typing import Any

from gcsagent.host.cli.argument_types import typed
from gcsagent.host.cli.common import complain, connect, print_json
from gcsagent.host.cli.declare import Add
from gcsagent.host.forwards import LOCALHOST, Wanted, listening, serving, shown
from gcsagent.host.signalling import handled
from gcsagent.host.text import printable
from protocol.errors import RpcError


def add_forward_command(commands: Any, add: Add) -> None:
    parser = add(
        commands,
        "forward",
        run,
        "make ports and sockets of the guest or of containers reachable here, until interrupted",
        "gcsctl --vm dev forward 8080:web:80 0::9000 /tmp/db.sock:db:/run/db.sock",
    )
    parser.add_argument(
        "forwards",
        nargs="+",
        type=typed(Wanted.parse),
        metavar="[ADDR:]PORT:ID:PORT",
        help="here, container, there; an empty ID is the guest itself, 0 here picks a free port, and"
        f" either side may be the path of a UNIX socket (ADDR is {LOCALHOST} by default)",
    )


async def run(args: argparse.Namespace) -> int:
    """Until a signal, which is how it ends well."""
    stop = asyncio.Event()
    with handled((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), lambda _: stop.set()):
        stopping = asyncio.create_task(stop.wait())
        work = asyncio.create_task(_serve(args))
        try:
            await asyncio.wait((stopping, work), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            for task in (stopping, work):
                task.cancel()
            await asyncio.gather(stopping, work, return_exceptions=True)
    return 0


async def _serve(args: argparse.Namespace) -> None:
    """Raises OSError once one of them accepts no more."""

    def reporter(wanted: Wanted) -> Callable[[Exception], None]:
        return _reporter(wanted, args.json)

    with listening(args.forwards) as sockets:
        async with await connect(args) as client, serving(client, sockets, reporter) as forwarders:
            for wanted, listener in sockets:
                _say(wanted, listener, args.json)
            await asyncio.gather(*(forwarder.failed() for forwarder in forwarders))


def _say(wanted: Wanted, listener: socket.socket, as_json: bool) -> None:
    if as_json:
        place: dict[str, object] = {"path": wanted.where}
        if not isinstance(wanted.where, str):
            address, port = listener.getsockname()[:2]
            place = {"address": address, "port": port}
        print_json({"event": "listening", "local": place, "target": wanted.target}, indent=None)
    else:
        print(f"{shown(listener)} -> {wanted.to}", flush=True)


def _reporter(wanted: Wanted, as_json: bool) -> Callable[[Exception], None]:
    def report(error: Exception) -> None:
        message = error.message if isinstance(error, RpcError) else str(error)
        if as_json:
            code = {"code": error.code.value, "details": error.details} if isinstance(error, RpcError) else {}
            document = {"event": "error", "target": wanted.target, "message": printable(message), **code}
            print_json(document, indent=None, to_stderr=True)
        else:
            complain(f"{wanted.to}: {message}")

    return report
