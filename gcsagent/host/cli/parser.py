"""The command line of gcsctl. Each command sets ``handler``: a coroutine function, arguments to exit code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from gcsagent import __version__
from gcsagent.host.cli import (
    about,
    checkpoints,
    container_options,
    events,
    logs,
    manage,
    pods,
    resources,
    run,
)
from gcsagent.host.cli.argument_types import (
    absolute_path,
    add_id,
    argument,
    count,
    identifier,
    interval,
    patience,
    signal,
    typed,
)
from gcsagent.host.cli.common import complain
from gcsagent.host.cli.copy import add_copy_command
from gcsagent.host.cli.forward import add_forward_command
from gcsagent.host.cli.guest import add_guest_commands, add_vm_grow
from gcsagent.host.cli.images import add_image_commands, add_image_options
from gcsagent.host.cli.network import add_network_commands, add_nic_commands
from gcsagent.host.cli.replug import add_replug_command
from gcsagent.host.cli.seeing import add_seeing_commands
from gcsagent.host.cli.share import add_share_commands
from gcsagent.host.cli.shell import add_shell_command
from gcsagent.host.cli.shells import add_completion_command
from gcsagent.host.cli.snapshots import add_snapshot_commands, add_vm_snapshot_commands
from gcsagent.host.cli.stdio import FIFOS
from gcsagent.host.cli.storage import add_disk_commands, add_storage_commands
from gcsagent.host.cli.top import add_top_command
from gcsagent.host.cli.vmrun import vm_run
from gcsagent.host.upgrade import TRIAL_SECONDS
from gcsagent.host.vm.vmcli import add_vm_options, add_vm_parser
from protocol import checks

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

    def error(self, message: str) -> NoReturn:
        complain(f"{message} (see `{self.prog} --help`)")
        sys.exit(EXIT_GCSCTL)


def build() -> argparse.ArgumentParser:
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
    _add_agent_commands(commands)
    _add_run_commands(commands)
    _add_container_commands(commands)
    add_forward_command(commands, _add)
    add_copy_command(commands, _add)
    add_shell_command(commands, _add)
    add_guest_commands(commands, _add)
    add_network_commands(commands, _add)
    add_seeing_commands(commands, _add)
    add_top_command(commands, _add)
    add_storage_commands(commands, _add)
    add_image_commands(commands, _add)
    add_snapshot_commands(commands, _add)
    add_completion_command(commands, _add)
    vm_commands = add_vm_parser(commands, _add)
    _add_vm_run(vm_commands)
    add_disk_commands(vm_commands, _add)
    add_share_commands(vm_commands, _add)
    add_nic_commands(vm_commands, _add)
    add_vm_grow(vm_commands, _add)
    add_replug_command(vm_commands, _add)
    add_vm_snapshot_commands(vm_commands, _add)
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


def _add_agent_commands(commands: _Subparsers) -> None:
    _add(commands, "info", about.info, "show agent, guest and runtime", "gcsctl --vm dev info")
    _add(commands, "ping", manage.ping, "ask the agent whether it is well", "gcsctl --vm dev ping")
    parser = _add(
        commands,
        "events",
        events.events,
        "show what has happened, as far as the agent's ring of events goes back",
        "gcsctl events -f --since 10m --container web",
    )
    parser.add_argument("-f", "--follow", action="store_true", help="go on until interrupted")
    parser.add_argument("--container", type=identifier, metavar="ID", help="only those of one container")
    parser.add_argument(
        "--since",
        type=typed(logs.since),
        metavar="T",
        help="begin with those since: 10m, 1h30m, 2026-01-31T12:00:00Z",
    )
    parser.add_argument("--after", type=count, metavar="SEQ", help="begin with those numbered above SEQ")
    parser = _add(
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


def _add_run_commands(commands: _Subparsers) -> None:
    parser = _add(
        commands,
        "run",
        run.run_command,
        "create, start and wait for a container; its only network is lo, unless --network says otherwise",
        "gcsctl run --rm -it --image ./app.tar -- sh",
    )
    parser.add_argument("--rm", action="store_true", help="delete the container when it has ended")
    parser.add_argument("-d", "--detach", action="store_true", help="print the id and leave it running")
    _add_container_options(parser, quiet=False)
    parser = _add(
        commands,
        "create",
        run.create_command,
        "create a container for `start`; without -i, -t and --log its output goes nowhere",
        "gcsctl create --id web --rootfs ./rootfs -- httpd -f",
    )
    _add_container_options(parser, quiet=True)
    parser = _add(
        commands, "exec", run.exec_command, "run a command in a container", "gcsctl exec -it web -- sh"
    )
    parser.add_argument("-d", "--detach", action="store_true", help="print the process id, leave it running")
    parser.add_argument("--log", action="store_true", help="with -d: keep its output for `logs --process P`")
    _add_process_options(parser)
    container_options.add_exec_options(parser)
    add_id(parser)
    _add_command(parser)
    parser = _add(
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


def _add_container_commands(commands: _Subparsers) -> None:
    add_id(_add(commands, "start", manage.start, "start a created container", "gcsctl start web"))
    add_id(_add(commands, "state", manage.state, "show a container", "gcsctl state web"))
    add_id(
        _add(
            commands,
            "wait",
            manage.wait,
            "wait until a container has ended; its exit code is gcsctl's",
            "gcsctl wait web; echo $?",
        )
    )
    _add_kill(commands)
    add_id(_add(commands, "pause", manage.pause, "freeze a container's processes", "gcsctl pause web"))
    add_id(_add(commands, "resume", manage.resume, "let a paused container run on", "gcsctl resume web"))
    resources.add_resource_commands(commands, _add)
    checkpoints.add_checkpoint_commands(commands, _add)
    pods.add_pod_commands(commands, _add)
    parser = _add(commands, "delete", manage.delete, "remove an ended container", "gcsctl delete --force web")
    parser.add_argument(
        "--force", action="store_true", help="kill what still runs in it; with a sandbox goes its pod"
    )
    add_id(parser)
    logs.add_logs_command(commands, _add)
    parser = _add(commands, "ps", manage.ps, "list containers, or one's processes", "gcsctl ps web")
    parser.add_argument("id", nargs="?", type=identifier, metavar="ID")


def _add_kill(commands: _Subparsers) -> None:
    parser = _add(
        commands,
        "kill",
        manage.kill,
        "signal init, one exec, or all of a container",
        "gcsctl kill -s KILL web",
    )
    parser.add_argument(
        "-s",
        "--signal",
        type=signal,
        default="SIGTERM",
        metavar="SIG",
        help="number or name, RTMIN+3 too; default: %(default)s",
    )
    parser.add_argument("-a", "--all", action="store_true", help="every process of the container")
    parser.add_argument("-p", "--process", type=identifier, metavar="PROCESS", help="an exec of it")
    add_id(parser)


def _add_vm_run(commands: _Subparsers) -> None:
    parser = _add(
        commands,
        "run",
        vm_run,
        "boot a VM, run a command on a root file system or an image in it, power off",
        "gcsctl vm run --image ./app.tar -it -- sh",
    )
    add_vm_options(parser)
    add_image_options(parser)
    parser.add_argument("-v", "--verbose", action="store_true", help="show progress though not on a terminal")
    _add_process_options(parser)
    _add_command(parser)


def _add_container_options(parser: argparse.ArgumentParser, *, quiet: bool) -> None:
    parser.add_argument("--id", type=identifier, metavar="ID", help="default: a random one")
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
    _add_process_options(parser)
    container_options.add_container_options(parser)
    pods.add_options(parser)
    _add_command(parser)
    parser.set_defaults(quiet=quiet)


def _add_process_options(parser: argparse.ArgumentParser) -> None:
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


def _add_command(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "command", type=argument, nargs=argparse.REMAINDER, metavar="-- CMD [ARG...]", help="what to run"
    )


def _fifo(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    if name not in FIFOS or not path:
        raise argparse.ArgumentTypeError(f"{text!r} must be STREAM=PATH, STREAM one of {', '.join(FIFOS)}")
    return name, path


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments; ``command`` without the ``--`` before it. Exits on errors and ``--help``."""
    args = build().parse_args(argv)
    command = getattr(args, "command", None)
    if command and command[0] == "--":
        del command[0]
    return args
