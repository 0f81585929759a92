"""`gcsctl info`, `ping` and `upgrade`: their arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gcsagent.host.cli import about, manage
from gcsagent.host.cli.argument_types import interval
from gcsagent.host.cli.declare import Add
from gcsagent.host.upgrade import TRIAL_SECONDS


def add_agent_commands(commands: Any, add: Add) -> None:
    add(commands, "info", about.info, "show agent, guest and runtime", "gcsctl --vm dev info")
    add(commands, "ping", manage.ping, "ask the agent whether it is well", "gcsctl --vm dev ping")
    parser = add(
        commands,
        "upgrade",
        manage.upgrade_agent,
        "replace the agent's code while containers run; what does not start is rolled back",
        "gcsctl upgrade ./src",
    )
    parser.add_argument(
        "path",
        type=Path,
        metavar="PATH",
        help="a directory with gcsagent/ and protocol/, or an archive of one",
    )
    parser.add_argument(
        "--trial",
        type=interval,
        default=TRIAL_SECONDS,
        metavar="SECONDS",
        help="what the new code may take to be ready, default: %(default)g",
    )
