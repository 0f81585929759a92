"""What runs something: the arguments of `gcsctl run`, `create`, `exec` and `attach`."""

from __future__ import annotations

import argparse
from typing import Any

from gcsagent.host.cli import container_options, pods, run
from gcsagent.host.cli.argument_types import absolute_path, add_id, argument, identifier
from gcsagent.host.cli.declare import Add
from gcsagent.host.cli.images import add_image_options
from gcsagent.host.cli.stdio import FIFOS
from protocol import checks


def add_run_commands(commands: Any, add: Add) -> None:
    parser = add(
        commands,
        "run",
        run.run_command,
        "create, start and wait for a container; its only network is lo, unless --network says otherwise",
        "gcsctl run --rm -it --image ./app.tar -- sh",
    )
    parser.add_argument("--rm", action="store_true", help="delete the container when it has ended")
    parser.add_argument("-d", "--detach", action="store_true", help="print the id and leave it running")
    _add_container_options(parser, quiet=False)
    parser = add(
        commands,
        "create",
        run.create_command,
        "create a container for `start`; without -i, -t and --log its output goes nowhere",
        "gcsctl create --id web --rootfs ./rootfs -- httpd -f",
    )
    _add_container_options(parser, quiet=True)
    parser = add(
        commands, "exec", run.exec_command, "run a command in a container", "gcsctl exec -it web -- sh"
    )
    parser.add_argument("-d", "--detach", action="store_true", help="print the process id, leave it running")
    parser.add_argument("--log", action="store_true", help="with -d: keep its output for `logs --process P`")
    add_process_options(parser)
    container_options.add_exec_options(parser)
    add_id(parser)
    add_command(parser)
    parser = add(
        commands,
        "attach",
        run.attach_command,
        "connect this terminal to a running process; its exit code is gcsctl's",
        "gcsctl attach web",
    )
    add_id(parser)
    parser.add_argument(
        "--process", type=identifier, default=checks.INIT, metavar="P", help="default: %(default)s"
    )


def _add_container_options(parser: argparse.ArgumentParser, *, quiet: bool) -> None:
    parser.add_argument(
        "--id", "--name", dest="id", type=identifier, metavar="ID", help="default: a random one"
    )
    parser.add_argument("--rootfs", metavar="DIR", help="root directory, used in place")
    add_image_options(parser)
    parser.add_argument("--bundle", metavar="DIR", help="OCI bundle: its config.json says what to run")
    parser.add_argument("--log", action="store_true", help="keep its output for `logs`; so does -d")
    parser.add_argument("--overlay", action="store_true", help="throw away what is written to the root")
    parser.add_argument(
        "--runtime",
        default="",
        metavar="NAME",
        help="OCI runtime, one of those `info` shows; default: its first",
    )
    parser.add_argument(
        "--allow-vsock", action="store_true", help="do not deny the container AF_VSOCK and io_uring"
    )
    add_process_options(parser)
    container_options.add_container_options(parser)
    pods.add_options(parser)
    add_command(parser)
    parser.set_defaults(quiet=quiet)


def add_process_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-i", "--interactive", action="store_true", help="pass standard input on")
    parser.add_argument("-t", "--tty", action="store_true", help="give the command a terminal")
    parser.add_argument(
        "--fifo",
        type=_fifo,
        action="append",
        default=[],
        metavar="STREAM=PATH",
        help="connect stdin, stdout or stderr to a named pipe in the guest; may be repeated",
    )
    parser.add_argument("-e", "--env", action="append", default=[], metavar="K=V", help="may be repeated")
    parser.add_argument("-w", "--workdir", type=absolute_path, metavar="DIR", help="working directory")
    container_options.add_process_options(parser)


def add_command(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "command", type=argument, nargs=argparse.REMAINDER, metavar="-- CMD [ARG...]", help="what to run"
    )


def _fifo(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    if name not in FIFOS or not path:
        raise argparse.ArgumentTypeError(f"{text!r} must be STREAM=PATH, STREAM one of {', '.join(FIFOS)}")
    return name, path
