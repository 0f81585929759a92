"""``gcsctl shell``: a root shell in the guest or in a container, also when the agent does not answer."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
from typing import Any

from gcsagent.host import shell, terminal
from gcsagent.host.bridge import LocalStdio, bridge
from gcsagent.host.cli.argument_types import argument, between, identifier, typed
from gcsagent.host.cli.common import (
    CLIENT_NAME,
    UsageError,
    agent_address,
    complain,
    print_json,
    print_table,
)
from gcsagent.host.cli.declare import Add
from gcsagent.host.cli.run import environment, resizing
from gcsagent.host.cli.signals import Signals
from gcsagent.host.shell import Shell
from gcsagent.host.transport import Address
from protocol import checks
from protocol.families.shell import OpenShell, ShellEnd, ShellExit, ShellRef, terminal_type
from protocol.types import Winsize

VARIABLE = "GCS_SHELL_ADDRESS"
_STDIN, _STDOUT = 0, 1


def add_shell_command(commands: Any, add: Add) -> None:
    parser = add(
        commands,
        "shell",
        run,
        "a root shell in the guest, or in a container's namespaces, where that is allowed (`vm start"
        " --shell`); not the agent answers, so it works also when that hangs",
        "gcsctl --vm dev shell web -- ps",
    )
    parser.add_argument(
        "--timeout", type=between(0.001, 86_400, "seconds"), metavar="SECONDS", help="end it after that long"
    )
    parser.add_argument(
        "-e", "--env", type=argument, action="append", default=[], metavar="K=V", help="may be repeated"
    )
    parser.add_argument(
        "--shell-address",
        type=typed(shell.parse_address),
        metavar="ADDRESS",
        help=f"default: {VARIABLE}, else port 1025 of the guest that --vm or --address names",
    )
    parser.add_argument("--list", action="store_true", help="list the shells that are open")
    parser.add_argument("--kill", type=identifier, metavar="SHELL", help="end one of them")
    parser.add_argument(
        "container",
        type=argument,
        nargs=argparse.REMAINDER,
        metavar="[ID] [-- CMD [ARG...]]",
        help="container, and what to run instead of bash or sh; without ID, in the guest itself",
    )


async def run(args: argparse.Namespace) -> int:
    container, command = _split(args.container)
    address = _address(args)
    if args.list:
        return await _list(address, args.json)
    if args.kill:
        async with await shell.connect(address, CLIENT_NAME) as client:
            await client.call("shell.kill", ShellRef(args.kill))
        if args.json:
            print_json({"shell": args.kill})
        return 0
    term = os.environ.get("TERM", "")
    wanted = OpenShell(
        container=container,
        argv=tuple(command),
        env=dict(each.split("=", 1) for each in environment(args.env)),
        terminal=os.isatty(_STDIN),
        term=term if terminal_type(term) is None else "linux",
        winsize=terminal.winsize(0, 1, 2) or Winsize(),
        timeout_ms=None if args.timeout is None else max(1, round(args.timeout * 1000)),
    )
    with Signals():
        async with await Shell.open(address, wanted, client_name=CLIENT_NAME) as opened:
            ended = await _converse(opened, wanted.terminal)
    _explain(ended, args)
    if args.json:
        print_json(ended, to_stderr=True, indent=None)
    return ended.exit_code if 0 <= ended.exit_code <= 255 else 255


def _split(words: list[str]) -> tuple[str | None, list[str]]:
    container, rest = (words[0], words[1:]) if words and words[0] != "--" else (None, words)
    if rest and rest[0] != "--":
        raise UsageError(f"{rest[0]}: options go before the container, and a command behind --")
    problem = checks.identifier(container) if container is not None else None
    if problem is not None:
        raise UsageError(f"{container}: an id {problem}; a command goes behind --")
    return container, rest[1:]


def _address(args: argparse.Namespace) -> Address:
    """Raises UsageError, VmError."""
    given = args.shell_address
    if given is not None:
        return given  # type: ignore[no-any-return]
    try:
        if args.vm is None and args.address is None and os.environ.get(VARIABLE):
            return shell.parse_address(os.environ[VARIABLE])
        return shell.shell_address(agent_address(args))
    except ValueError as error:
        raise UsageError(f"{error}; give it with --shell-address") from error


async def _converse(opened: Shell, terminal_here: bool) -> ShellExit:
    with contextlib.ExitStack() as stack:
        if terminal_here:
            stack.enter_context(resizing(opened))
            stack.enter_context(terminal.raw(_STDIN))
        return await bridge(opened, LocalStdio(_STDIN, _STDOUT))


def _explain(ended: ShellExit, args: argparse.Namespace) -> None:
    reasons = {
        ShellEnd.TIMEOUT: f"its time limit of {args.timeout or 0:g} s has passed",
        ShellEnd.KILLED: "somebody has ended it (shell.kill)",
        ShellEnd.CONTAINER: "its container has ended",
        ShellEnd.SHUTDOWN: "the guest is being ended",
    }
    if ended.reason in reasons:
        complain(f"the shell was ended: {reasons[ended.reason]}")


async def _list(address: Address, as_json: bool) -> int:
    async with await shell.connect(address, CLIENT_NAME) as client:
        found = await shell.listing(client)
    if as_json:
        print_json(found.shells)
        return 0
    rows = [
        (
            each.shell,
            each.container or "-",
            each.pid,
            f"{each.running_ms / 1000:.0f} s",
            each.peer,
            _words(each.argv),
        )
        for each in found.shells
    ]
    print_table(("SHELL", "CONTAINER", "PID", "RUNNING", "PEER", "COMMAND"), rows)
    return 0


def _words(argv: tuple[str, ...]) -> str:
    return re.sub(r"\s+", " ", " ".join(argv)) or "bash or sh"
