"""``gcsctl forward``: local sockets that lead to what listens in the guest or in a container."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import re
import signal
import socket
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gcsagent.host import forward
from gcsagent.host.cli.common import UsageError, complain, connect, print_json
from gcsagent.host.dialogue import encode_params
from gcsagent.host.forward import Controls, Forwarder
from gcsagent.host.text import printable
from protocol.errors import RpcError
from protocol.families.forward import MAX_PORT, OpenForward

Add = Callable[..., argparse.ArgumentParser]
_SPEC = re.compile(
    r"(?:(?P<local>[./][^:]*)|(?:(?P<address>\[[^\]]*\]|[^:/\[\]]*):)?(?P<listen>[0-9]{1,5}))"
    r":(?P<container>[^:/]*):(?:(?P<port>[0-9]{1,5})|(?P<path>/.*))"
)
LOCALHOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Wanted:
    """``where`` is a local path, or an address and a port."""

    where: str | tuple[str, int]
    target: OpenForward

    @property
    def to(self) -> str:
        what = self.target.path or str(self.target.port)
        return f"{self.target.container or 'the guest'}:{what}"


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
        type=parse,
        metavar="[ADDR:]PORT:ID:PORT",
        help="here, container, there; an empty ID is the guest itself, 0 here picks a free port, and"
        f" either side may be the path of a UNIX socket (ADDR is {LOCALHOST} by default)",
    )


def parse(text: str) -> Wanted:
    """Raises ArgumentTypeError."""
    match = _SPEC.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(
            f"{text!r}: write [ADDR:]PORT:ID:PORT, with an empty ID for the guest itself, and with the"
            " path of a UNIX socket instead of either port"
        )
    port = None if match["port"] is None else int(match["port"])
    target = OpenForward(match["container"] or None, port, None, match["path"])
    try:
        encode_params("forward.open", target)
    except RpcError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error.message}") from error
    if match["local"] is not None:
        return Wanted(match["local"], target)
    listen = int(match["listen"])
    if listen > MAX_PORT:
        raise argparse.ArgumentTypeError(f"{text!r}: a port is a number up to {MAX_PORT}")
    return Wanted(((match["address"] or LOCALHOST).strip("[]"), listen), target)


async def run(args: argparse.Namespace) -> int:
    """Until SIGINT or SIGTERM, which is how it ends well."""
    stop = _stopped()
    async with await connect(args) as client, contextlib.AsyncExitStack() as stack:
        controls, forwarders = Controls(client), []
        for wanted in args.forwards:
            listener = _listen(wanted, stack)
            forwarder = Forwarder(controls, listener, wanted.target, _reporter(wanted, args.json))
            stack.push_async_callback(forwarder.aclose)
            forwarders.append(forwarder)
            _say(wanted, listener, args.json)
        failures = [asyncio.ensure_future(each.failed()) for each in forwarders]
        done, _ = await asyncio.wait([stop, *failures], return_when=asyncio.FIRST_COMPLETED)
        for future in failures:
            if future in done:
                future.result()
    return 0


def _listen(wanted: Wanted, stack: contextlib.AsyncExitStack) -> socket.socket:
    where = wanted.where
    try:
        listener = forward.listen(where)
    except OSError as error:
        shown = where if isinstance(where, str) else f"{where[0]}:{where[1]}"
        raise UsageError(f"cannot listen on {shown}: {error.strerror or error}") from error
    if isinstance(where, str):
        stack.callback(_unlink, where, os.stat(where).st_ino)
    return listener


def _unlink(path: str, inode: int) -> None:
    """Unless it is another's by now."""
    with contextlib.suppress(OSError):
        found = os.lstat(path)
        if stat.S_ISSOCK(found.st_mode) and found.st_ino == inode:
            os.unlink(path)


def _say(wanted: Wanted, listener: socket.socket, as_json: bool) -> None:
    if isinstance(wanted.where, str):
        here = wanted.where
        place: dict[str, object] = {"path": here}
    else:
        address, port = listener.getsockname()[:2]
        here = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        place = {"address": address, "port": port}
    if as_json:
        print_json({"event": "listening", "local": place, "target": wanted.target}, indent=None)
    else:
        print(f"{here} -> {wanted.to}", flush=True)


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


def _stopped() -> asyncio.Future[None]:
    """Done once SIGINT or SIGTERM has come."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()

    def stop() -> None:
        if not future.done():
            future.set_result(None)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    return future
