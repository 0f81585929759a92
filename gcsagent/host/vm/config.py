"""What a caller asks for when launching a VM, and what it learns when the VM has ended."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from gcsagent.host.vm.console import Finding
from gcsagent.host.vm.disk import Disk
from gcsagent.host.vm.errors import InvalidVmConfig
from gcsagent.host.vm.nic import NETWORKS, Nic
from gcsagent.host.vm.share import Share

DEFAULT_PORT = 1024
DEFAULT_MEMORY_MIB = 1024
DEFAULT_CPUS = min(2, os.cpu_count() or 1)

_PATHS = ("image", "kernel", "rootfs", "console_log", "qmp_path", "snapshot")

OWN = ("name", "image", "vsock", "boot_timeout", "forwards", "console_log", "qmp_path", "snapshot")
"""Fields that are of one VM, and no part of a snapshot of it."""


@dataclass(frozen=True, slots=True)
class VmConfig:
    """A VM to launch.

    Attributes:
        memory_mib: guest memory in MiB.
        image: directory with `vmlinuz` and `initramfs`; None: GCS_IMAGE, else the cache.
        kernel: another one than the image's; what it has no modules for must be built in.
        rootfs: directory or image file that the guest mounts read-only at /run/gcs/disks/rootfs.
        disks: further disks; those with a type are mounted at /run/gcs/disks/NAME.
        net: none, or user for a network card with QEMU's user-mode network; the guest is not configured.
        mac: that card's address; None: a random one.
        shares: directories of this host, mounted at /run/gcs/shares/TAG.
        forwards: `gcsctl forward`'s words, for whoever looks after the VM (`gcsagent.host.forwards`).
        cmdline: words added to the kernel's command line.
        accel: auto, kvm or tcg.
        vsock: auto, vhost or vhost-user.
        port: the vsock port the agent listens on.
        shell: allow the debug shell, for this host (`gcsagent.host.shell`).
        boot_timeout: seconds until the guest must be ready; None: 60 under KVM, 180 under TCG.
        console_log: file that gets the console's raw bytes, bounded by rotation to `console_log`.1.
        qmp_path: where an additional QEMU monitor listens, for people.
        max_cpus, max_memory_mib: what it can be grown to while it runs (`gcsagent.host.grow`).
        snapshot: directory that `VirtualMachine.save` made: it goes on from there instead of booting. What
            the guest has comes with it; name, image, vsock, boot_timeout and where to log to are its own.
    """

    name: str = "gcs"
    memory_mib: int = DEFAULT_MEMORY_MIB
    cpus: int = DEFAULT_CPUS
    image: Path | None = None
    kernel: Path | None = None
    rootfs: Path | None = None
    disks: tuple[Disk, ...] = ()
    shares: tuple[Share, ...] = ()
    forwards: tuple[str, ...] = ()
    cmdline: tuple[str, ...] = ()
    net: str = "none"
    mac: str | None = None
    accel: str = "auto"
    vsock: str = "auto"
    port: int = DEFAULT_PORT
    shell: bool = False
    boot_timeout: float | None = None
    console_log: Path | None = None
    qmp_path: Path | None = None
    max_cpus: int | None = None
    max_memory_mib: int | None = None
    snapshot: Path | None = None

    def __post_init__(self) -> None:
        if not 0 < self.port < 0xFFFFFFFF:
            raise InvalidVmConfig(f"vsock port {self.port} must be 1 to 4294967294")
        if self.net not in NETWORKS:
            raise InvalidVmConfig(f"network {self.net!r} must be one of {', '.join(NETWORKS)}")
        if self.mac is not None:
            Nic(self.mac.lower())
            if self.net == "none":
                raise InvalidVmConfig("a MAC address goes with a network: give --net user, too")
        self._check_snapshot()
        if self.boot_timeout is not None and not self.boot_timeout > 0:
            raise InvalidVmConfig(f"boot timeout {self.boot_timeout} must be a positive number of seconds")

    def _check_snapshot(self) -> None:
        if self.snapshot is None:
            return
        for field in fields(self):
            if field.name not in OWN and getattr(self, field.name) != field.default:
                raise InvalidVmConfig(f"{field.name} comes with the snapshot: leave it out")

    def to_json(self) -> dict[str, Any]:
        """As plain JSON data, for the process that keeps a named VM."""
        data = asdict(self)
        for key in _PATHS:
            data[key] = None if data[key] is None else str(data[key])
        for kind in ("disks", "shares"):
            data[kind] = [{**each, "path": str(each["path"])} for each in data[kind]]
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> VmConfig:
        """The inverse of `to_json`; unknown keys are ignored."""
        known = {field.name for field in fields(cls)}
        values = {key: value for key, value in data.items() if key in known}
        for key in _PATHS:
            values[key] = Path(values[key]) if values.get(key) is not None else None
        values["disks"] = tuple(Disk(**{**disk, "path": Path(disk["path"])}) for disk in values["disks"])
        values["shares"] = tuple(
            Share(**{**each, "path": Path(each["path"])}) for each in values.get("shares", ())
        )
        values["cmdline"] = tuple(values["cmdline"])
        values["forwards"] = tuple(values.get("forwards", ()))
        return cls(**values)


@dataclass(frozen=True, slots=True)
class VmExit:
    """How a VM ended.

    Attributes:
        clean: the guest powered off or rebooted by itself or on request; no panic, no kill.
        reason: one line.
        status: QEMU's exit status, or minus the signal number that ended it.
        findings: signs of kernel trouble on the console during the VM's whole life.
    """

    clean: bool
    reason: str
    status: int
    findings: tuple[Finding, ...] = ()
