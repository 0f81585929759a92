"""The options that describe a VM, of `vm start` and `vm run`, and the VM they describe."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from gcsagent.host.forwards import Wanted
from gcsagent.host.vm.config import DEFAULT_CPUS, DEFAULT_MEMORY_MIB, VmConfig
from gcsagent.host.vm.disk import Disk
from gcsagent.host.vm.errors import InvalidVmConfig
from gcsagent.host.vm.nic import NETWORKS
from gcsagent.host.vm.share import Share

T = TypeVar("T")


def add_vm_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that describe a VM, as `config_from_args` reads them."""
    _add_machine(parser)
    _add_devices(parser)
    _add_manner(parser)


def _add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--memory", type=int, default=DEFAULT_MEMORY_MIB, metavar="M", help="MiB (default: %(default)s)"
    )
    parser.add_argument("--cpus", type=int, default=DEFAULT_CPUS, metavar="N", help="default: %(default)s")
    parser.add_argument("--max-cpus", type=int, metavar="N", help="what `vm grow` can bring them to")
    parser.add_argument("--max-memory", type=int, metavar="M", help="MiB that `vm grow` can bring it to")
    parser.add_argument(
        "--guest-image",
        type=Path,
        metavar="DIR",
        help="what the VM boots (default: GCS_IMAGE, else the built one)",
    )
    parser.add_argument(
        "--kernel",
        type=Path,
        metavar="FILE",
        help="another kernel than the guest image's: of the same version, or with virtio and vsock built in",
    )


def _add_devices(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rootfs", type=Path, metavar="DIR|FILE", help="root file system for containers, read-only"
    )
    parser.add_argument(
        "--disk",
        type=disk,
        action="append",
        default=[],
        metavar="FILE[:NAME][:ro]",
        help="a raw image or block device, for `storage mount --serial NAME`; NAME is its name by default;"
        " may be repeated",
    )
    parser.add_argument(
        "--share",
        type=share,
        action="append",
        default=[],
        metavar="DIR[:TAG][:ro]",
        help="share a directory, mounted at /run/gcs/shares/TAG; TAG is its name by default; may be repeated",
    )
    parser.add_argument(
        "--forward",
        type=_forward,
        action="append",
        default=[],
        metavar="[ADDR:]PORT:ID:PORT",
        help="as `gcsctl forward` has it, while the VM runs; `vm ls --json` shows them; may be repeated",
    )
    parser.add_argument(
        "--net",
        choices=NETWORKS,
        default="none",
        help="user: a network card that reaches what this host reaches, configured; default: %(default)s",
    )
    parser.add_argument("--mac", metavar="MAC", help="of that card; default: a random one")


def _add_manner(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--accel", choices=("auto", "kvm", "tcg"), default="auto", help="default: %(default)s"
    )
    parser.add_argument(
        "--vsock", choices=("auto", "vhost", "vhost-user"), default="auto", help="default: %(default)s"
    )
    parser.add_argument(
        "--boot-timeout", type=float, metavar="S", help="seconds (default: 60 under KVM, 180 under TCG)"
    )
    parser.add_argument(
        "--shell", action="store_true", help="allow `gcsctl shell`, also while the agent does not answer"
    )
    parser.add_argument(
        "--append", action="append", default=[], metavar="WORD", help="add to the kernel command line"
    )


def config_from_args(args: argparse.Namespace) -> VmConfig:
    """The VM that the options of `add_vm_options` describe.

    Raises:
        InvalidVmConfig: a value cannot be used.
    """
    return VmConfig(
        memory_mib=args.memory,
        cpus=args.cpus,
        image=args.guest_image,
        kernel=args.kernel,
        rootfs=args.rootfs,
        disks=tuple(args.disk),
        shares=tuple(args.share),
        forwards=tuple(args.forward),
        cmdline=tuple(args.append),
        shell=args.shell,
        net=args.net,
        mac=args.mac,
        accel=args.accel,
        vsock=args.vsock,
        boot_timeout=args.boot_timeout,
        max_cpus=args.max_cpus,
        max_memory_mib=args.max_memory,
    )


def disk(text: str) -> Disk:
    """``FILE[:NAME][:ro]``. Raises ArgumentTypeError."""
    return _parsed(Disk.parse, text)


def share(text: str) -> Share:
    """``DIR[:TAG][:ro]``. Raises ArgumentTypeError."""
    return _parsed(Share.parse, text)


def _forward(text: str) -> str:
    try:
        Wanted.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None
    return text


def _parsed(parse: Callable[[str], T], text: str) -> T:
    try:
        return parse(text)
    except InvalidVmConfig as error:
        raise argparse.ArgumentTypeError(str(error)) from None
