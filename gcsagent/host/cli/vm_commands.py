"""`gcsctl vm`: its commands, those for a running VM's devices among them."""

from __future__ import annotations

from typing import Any

from gcsagent.host.cli.declare import Add
from gcsagent.host.cli.guest import add_vm_grow
from gcsagent.host.cli.images import add_image_options
from gcsagent.host.cli.network import add_nic_commands
from gcsagent.host.cli.replug import add_replug_command
from gcsagent.host.cli.run_commands import add_command, add_process_options
from gcsagent.host.cli.share import add_share_commands
from gcsagent.host.cli.snapshots import add_vm_snapshot_commands
from gcsagent.host.cli.storage import add_disk_commands
from gcsagent.host.cli.vm_options import add_vm_options
from gcsagent.host.cli.vmrun import vm_run
from gcsagent.host.cli.vms import add_vm_parser


def add_vm_commands(commands: Any, add: Add) -> None:
    vm_commands = add_vm_parser(commands, add)
    _add_vm_run(vm_commands, add)
    for more in (
        add_disk_commands,
        add_share_commands,
        add_nic_commands,
        add_vm_grow,
        add_replug_command,
        add_vm_snapshot_commands,
    ):
        more(vm_commands, add)


def _add_vm_run(commands: Any, add: Add) -> None:
    parser = add(
        commands,
        "run",
        vm_run,
        "boot a VM, run a command on a root file system or an image in it, power off",
        "gcsctl vm run --image ./app.tar -it -- sh",
    )
    add_vm_options(parser)
    add_image_options(parser)
    parser.add_argument("-v", "--verbose", action="store_true", help="show progress though not on a terminal")
    add_process_options(parser)
    add_command(parser)
