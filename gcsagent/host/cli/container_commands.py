"""What is done with a container that is there: the arguments of `gcsctl start`, `kill`, `ps` and so on."""

from __future__ import annotations

import argparse
from typing import Any

from gcsagent.host.cli import manage
from gcsagent.host.cli.argument_types import add_id, add_ids, identifier, patience, signal
from gcsagent.host.cli.declare import Add
from gcsagent.host.cli.several import each


def add_container_commands(commands: Any, add: Add) -> None:
    add_ids(add(commands, "start", each(manage.start), "start created containers", "gcsctl start web"))
    add_id(add(commands, "state", manage.state, "show a container", "gcsctl state web"))
    add_id(
        add(
            commands,
            "wait",
            manage.wait,
            "wait until a container has ended; its exit code is gcsctl's",
            "gcsctl wait web; echo $?",
        )
    )
    _add_stop(commands, add)
    _add_kill(commands, add)
    add_ids(add(commands, "pause", each(manage.pause), "freeze containers' processes", "gcsctl pause web"))
    add_ids(add(commands, "resume", each(manage.resume), "let paused containers run on", "gcsctl resume web"))
    parser = add(
        commands, "delete", each(manage.delete), "remove ended containers", "gcsctl delete -f web db"
    )
    parser.add_argument(
        "-f", "--force", action="store_true", help="kill what still runs in it; with a sandbox goes its pod"
    )
    add_ids(parser)
    parser = add(commands, "ps", manage.ps, "list containers, or one's processes", "gcsctl ps web")
    parser.add_argument("id", nargs="?", type=identifier, metavar="ID")


def _add_stop(commands: Any, add: Add) -> None:
    parser = add(
        commands,
        "stop",
        each(manage.stop, at_once=True),
        "end containers: a signal for init, and SIGKILL for what is left after a while",
        "gcsctl stop -t 3 web db && gcsctl delete web db",
    )
    parser.add_argument(
        "-t", "--time", type=patience, default=10.0, metavar="SECONDS", help="the while; default: %(default)g"
    )
    _add_signal(parser)
    add_ids(parser)


def _add_kill(commands: Any, add: Add) -> None:
    parser = add(
        commands,
        "kill",
        each(manage.kill),
        "signal init, one exec, or all of a container",
        "gcsctl kill -s KILL web",
    )
    _add_signal(parser)
    parser.add_argument("-a", "--all", action="store_true", help="every process of the container")
    parser.add_argument("-p", "--process", type=identifier, metavar="PROCESS", help="an exec of it")
    add_ids(parser)


def _add_signal(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-s",
        "--signal",
        type=signal,
        default="SIGTERM",
        metavar="SIG",
        help="number or name, RTMIN+3 too; default: %(default)s",
    )
