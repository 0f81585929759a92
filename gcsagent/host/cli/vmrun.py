"""``gcsctl vm run``: boot, run one command on the given root file system, power off."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

from gcsagent.host import network
from gcsagent.host.cli import image_roots, option_text
from gcsagent.host.cli.common import CLIENT_NAME, CONNECT_SECONDS, UsageError
from gcsagent.host.cli.image_roots import ImageRoot
from gcsagent.host.cli.run import RunPlan, run_container, run_plan
from gcsagent.host.cli.signals import Signals
from gcsagent.host.cli.vm_options import config_from_args
from gcsagent.host.cli.vms import print_progress
from gcsagent.host.client import Client
from gcsagent.host.forwards import Wanted, kept, listening
from gcsagent.host.image.cache import Form
from gcsagent.host.vm.launcher import Progress, VirtualMachine
from gcsagent.host.vm.running import run_in_vm
from gcsagent.host.vm.timeline import table
from protocol.address import HybridAddress

GUEST_ROOTFS = "/run/gcs/disks/rootfs"
"""Where the guest mounts the disk named ``rootfs``."""


async def vm_run(args: argparse.Namespace) -> int:
    if (args.rootfs is None) == (args.image is None):
        raise UsageError("give --rootfs DIR or FILE, or --image IMAGE: what the command runs on")
    if not args.command and args.image is None:
        raise UsageError("give a command to run after --")
    image = None
    if args.image is not None:
        entry, args.rootfs = await image_roots.unpacked(args.image, Form.DISK)
        image = ImageRoot(GUEST_ROOTFS, entry.config)
    plan = vm_plan(args, image)
    progress = _progress(args.verbose or sys.stderr.isatty())

    async def body(vm: VirtualMachine) -> int:
        progress(f"ready in {vm.timeline.moments()[-1].seconds:.1f} s")
        for line in table(vm.timeline.moments()) if args.verbose else ():
            progress(line)
        with Signals() as signals:
            async with (
                await Client.connect(vm.address, timeout=CONNECT_SECONDS, client_name=CLIENT_NAME) as client,
                kept(vm.address, sockets) as forwards,
            ):
                for told in forwards:
                    progress(told)
                for nic in vm.nics:
                    await network.use_user_network(client, nic.mac)
                return await run_container(client, plan, signals)

    with listening([Wanted.parse(text) for text in args.forward]) as sockets:
        return await run_in_vm(config_from_args(args), body, progress=progress)


def vm_plan(args: argparse.Namespace, image: ImageRoot | None = None) -> RunPlan:
    """The container of ``vm run``: the disk is read-only, so it gets a throw-away layer.

    What is shared is where it is in the guest, too.
    """
    own = {
        "id": None,
        "bundle": None,
        "rootfs": None if image else GUEST_ROOTFS,
        "overlay": True,
        "runtime": "",
        "allow_vsock": False,
        "rm": True,
        "quiet": False,
        "vm_network": "host" if args.net == "user" else "none",
    }
    plan = run_plan(argparse.Namespace(**{**vars(args), **own}), HybridAddress("in the guest"), image)
    shares = [option_text.bind(each.target, each.target, each.read_only) for each in args.share]
    spec = plan.params.spec or {}
    spec = {**spec, "mounts": [*spec["mounts"], *shares]}
    return replace(plan, params=replace(plan.params, spec=spec))


def _progress(shown: bool) -> Progress:
    def silent(text: str) -> None:
        pass

    return print_progress if shown else silent
