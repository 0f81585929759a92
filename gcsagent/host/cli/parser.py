"""The command line of gcsctl. Each command sets ``handler``: a coroutine function, arguments to exit code."""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, NoReturn

from gcsagent import __version__
from gcsagent.host.cli.argument_types import patience
from gcsagent.host.cli.common import complain

EXIT_GCSCTL = 125
"""gcsctl's own failures, as docker run has it; 126 and 127 are about the command in the container."""

Handler = Callable[[argparse.Namespace], Awaitable[int]]
if TYPE_CHECKING:
    _Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]  # not subscriptable at run time

_EPILOG = """\
addresses: unix:PATH, vsock:CID[:PORT], hvsock:PATH[:PORT] (a VMM's UNIX socket)
exit code: that of the command run; 125 when gcsctl, the agent or the VM failed,
126 when the command cannot be executed, 127 when it is not there

examples:
  gcsctl vm run --rootfs ./rootfs -it -- sh
  gcsctl --address unix:/run/gcs.sock run --rm --rootfs ./rootfs -- uname -a
"""


class Parser(argparse.ArgumentParser):
    """Errors in one line and with gcsctl's own exit code: 2 could be the command's."""

    def __init__(self, **arguments: Any) -> None:
        arguments.setdefault("allow_abbrev", False)
        arguments.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**arguments)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """An unknown command is answered with the one that was meant, not with all there are."""
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            near = [_ELSEWHERE[value]] if _ELSEWHERE.get(value, "").split(" ")[0] in action.choices else []
            near = near or difflib.get_close_matches(value, action.choices)
            meant = f"; is it {' or '.join(f'`{name}`' for name in near)}?" if near else ""
            raise argparse.ArgumentError(None, f"there is no command {value!r}{meant}")
        super()._check_value(action, value)

    def error(self, message: str) -> NoReturn:
        complain(f"{message} (see `{self.prog} --help`)")
        sys.exit(EXIT_GCSCTL)


_ELSEWHERE = {
    "copy": "cp",
    "images": "image ls",
    "inspect": "state",
    "list": "ps",
    "ls": "ps",
    "remove": "delete",
    "rm": "delete",
    "unpause": "resume",
    "version": "info",
}
"""What docker, ctr and runc call some of our commands."""

COMPLETE = "__complete"
"""What the shells' scripts call on each Tab; no command of its own (:mod:`gcsagent.host.cli.shells`)."""

_FAMILIES = {
    ("info", "ping", "upgrade"): "agent_commands.add_agent_commands",
    ("events",): "events.add_events_command",
    ("run", "create", "exec", "attach"): "run_commands.add_run_commands",
    ("start", "state", "wait", "stop", "kill", "pause", "resume", "delete", "ps"): (
        "container_commands.add_container_commands"
    ),
    ("stats", "update"): "resources.add_resource_commands",
    ("checkpoint", "restore"): "checkpoints.add_checkpoint_commands",
    ("pod",): "pods.add_pod_commands",
    ("logs",): "logs.add_logs_command",
    ("forward",): "forward.add_forward_command",
    ("cp",): "copy.add_copy_command",
    ("shell",): "shell.add_shell_command",
    ("clock", "entropy", "resources", "online", "pressure", "shutdown"): "guest.add_guest_commands",
    ("network",): "network.add_network_commands",
    ("metrics", "stacks", "log-level", "agent-logs"): "seeing.add_seeing_commands",
    ("top",): "top.add_top_command",
    ("storage",): "storage.add_storage_commands",
    ("image",): "images.add_image_commands",
    ("snapshot",): "snapshots.add_snapshot_commands",
    ("completion",): "shells.add_completion_command",
    ("vm",): "vm_commands.add_vm_commands",
}
"""Which function beside us declares which commands; the order is that of `--help`.

Only what the command at hand needs is imported: all of it takes three times as long as most commands do.
"""

_COMMANDS = frozenset(name for names in _FAMILIES for name in names)

_WITH_VALUE = frozenset({"--address", "--vm", "--wait"})
"""gcsctl's own options that take the word after them."""


def build(word: str | None = None) -> argparse.ArgumentParser:
    """The parser for the command ``word``; without one that exists, for all commands."""
    parser = _top()
    parser.add_argument("--version", action="version", version=f"gcsctl {__version__}")
    parser.add_argument("--address", metavar="ADDRESS", help="the agent (default: GCS_ADDRESS)")
    parser.add_argument("--vm", metavar="NAME", help="the agent in the VM that `vm start NAME` started")
    parser.add_argument(
        "--wait",
        type=patience,
        dest="wait_for_agent",
        metavar="SECONDS",
        help="for an agent that is only being started; default: 10, none where there is no socket yet",
    )
    parser.add_argument("--json", action="store_true", help="print JSON; one document per line for events")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for names, family in _FAMILIES.items():
        if word not in _COMMANDS or word in names:
            _load(family)(commands, _add)
    return parser


def _top() -> argparse.ArgumentParser:
    return Parser(
        prog="gcsctl", description="Runs and looks after containers in lightweight VMs.", epilog=_EPILOG
    )


def _add(
    commands: _Subparsers, name: str, handler: Handler, help: str, example: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help, description=help, epilog=f"example: {example}")
    parser.set_defaults(handler=handler, command_name=parser.prog)
    # SUPPRESS: what was given before the command must not be reset by this default.
    parser.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")
    return parser


def _load(family: str) -> Callable[..., None]:
    module, _, function = family.partition(".")
    declare: Callable[..., None] = getattr(importlib.import_module(f"gcsagent.host.cli.{module}"), function)
    return declare


def command_of(argv: list[str]) -> str | None:
    """The first word that is neither an option nor an option's value."""
    words = iter(argv)
    for word in words:
        if word in _WITH_VALUE:
            next(words, None)
        elif not word.startswith("-"):
            return word
    return None


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments; ``command`` without the ``--`` before it. Exits on errors and ``--help``."""
    args = build(command_of(argv)).parse_args(argv)
    command = getattr(args, "command", None)
    if command and command[0] == "--":
        del command[0]
    return args
