"""QEMU's command line, as a pure function of a frozen description. Starting it is the launcher's business."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gcsagent.host.vm.accel import Accelerator
from gcsagent.host.vm.disk import Disk
from gcsagent.host.vm.errors import InvalidVmConfig
from gcsagent.host.vm.nic import Nic, nic_backend, nic_device
from gcsagent.host.vm.share import Share
from gcsagent.host.vm.vsockdev import Kind

VSOCK_DEVICE = "vsock"
VSOCK_PORT = "vsock-port"
VSOCK_BACKEND = "vsock0"

HOTPLUG_PORT = "plug"
# Each takes a device while the VM runs. They share one slot, as functions of it.
HOTPLUG_PORTS = 8
_HOTPLUG_SLOT = 0x10

MIN_MEMORY_MIB = 128
MAX_CPUS = 64
MAX_MEMORY_MIB = 1 << 20
MEMORY_SLOTS = 16
"""Pieces of memory that can be plugged in, each of any size."""

# console: the first serial port, there from the first instruction of the kernel on. panic=-1 resets at
# once, which -no-reboot turns into an exit. loglevel=5 shows warnings and worse: each console character
# costs an exit to QEMU, and an oops or panic raises the level by itself. cryptomgr.notests: the kernel does
# not try its own ciphers and hashes out, which under emulation takes up to a third of its start.
_BASE_CMDLINE = ("console=ttyS0", "panic=-1", "loglevel=5", "cryptomgr.notests")

# On a busy host the kernel's watchdog would catch an emulated TSC lagging and give it up for a slower clock.
_TCG_CMDLINE = ("tsc=reliable",)


@dataclass(frozen=True, slots=True)
class QemuConfig:
    """All that QEMU's command line depends on.

    Attributes:
        memory_mib: guest memory in MiB.
        cmdline: words added to the kernel's command line.
        vsock_fd: descriptor QEMU inherits: the vhost device, or the connected vhost-user socket.
        qmp_fd: descriptor QEMU inherits: a connected socket for its monitor.
        shares: each with a descriptor QEMU inherits: the connection to its virtiofsd.
        qmp_path: where a second monitor listens, for people.
        max_cpus, max_memory_mib: what the VM can grow to while it runs; None: what it begins with.
        machine: machine type.
        incoming: it waits for a VM that was saved, and has no vsock device yet.
        plugged: devices that saved VM had been given while it ran, as words of the command line.
    """

    qemu: Path
    accelerator: Accelerator
    memory_mib: int
    cpus: int
    kernel: Path
    initramfs: Path
    vsock: Kind
    vsock_fd: int
    vsock_cid: int
    qmp_fd: int
    name: str = "gcs"
    cmdline: tuple[str, ...] = ()
    disks: tuple[Disk, ...] = ()
    nics: tuple[Nic, ...] = ()
    shares: tuple[tuple[Share, int], ...] = ()
    qmp_path: Path | None = None
    max_cpus: int | None = None
    max_memory_mib: int | None = None
    machine: str = "q35"
    incoming: bool = False
    plugged: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.memory_mib < MIN_MEMORY_MIB:
            raise InvalidVmConfig(f"{self.memory_mib} MiB of memory is too little: at least {MIN_MEMORY_MIB}")
        if not 1 <= self.cpus <= MAX_CPUS:
            raise InvalidVmConfig(f"{self.cpus} cpus: must be 1 to {MAX_CPUS}")
        self._check_growth()
        for word in self.cmdline:
            if not word or not word.isprintable() or " " in word:
                raise InvalidVmConfig(
                    f"kernel command line word {word!r} must be printable and without spaces"
                )
        names = [disk.name for disk in self.disks]
        if len(set(names)) != len(names):
            raise InvalidVmConfig(f"disk names must differ: {', '.join(names)}")

    def _check_growth(self) -> None:
        if self.max_cpus is not None and not self.cpus <= self.max_cpus <= MAX_CPUS:
            raise InvalidVmConfig(f"max_cpus {self.max_cpus}: must be {self.cpus} (cpus) to {MAX_CPUS}")
        if self.max_memory_mib is not None and not self.memory_mib <= self.max_memory_mib <= MAX_MEMORY_MIB:
            raise InvalidVmConfig(
                f"max_memory_mib {self.max_memory_mib}: must be {self.memory_mib} (memory_mib)"
                f" to {MAX_MEMORY_MIB}"
            )


def qemu_argv(config: QemuConfig) -> list[str]:
    """The command line: console on standard output, monitor on an inherited socket."""
    return [
        str(config.qemu),
        *("-name", f"guest={_value(config.name)},debug-threads=on"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        # What a guest that has taken over QEMU must not do to the host.
        *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
        *_machine(config),
        *("-kernel", str(config.kernel), "-initrd", str(config.initramfs), "-append", kernel_cmdline(config)),
        *_monitors(config),
        *("-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"),
        *("-device", "pvpanic-pci"),
        *("-object", "rng-random,id=entropy,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=entropy"),
        # A restored guest sees another id, and its kernel reseeds before anybody asks it for a random number.
        *("-device", "vmgenid,guid=auto"),
        # Memory the guest has freed goes back to this host by itself, 2 MiB and more at a time.
        *("-device", "virtio-balloon-pci,free-page-reporting=on"),
        *_vsock(config),
        *_hotplug_ports(),
        *(word for nic in config.nics for word in _nic(nic)),
        *(word for disk in config.disks for word in _disk(disk)),
        *(word for share, fd in config.shares for word in _share(share, fd)),
        *config.plugged,
        *(("-incoming", "defer") if config.incoming else ()),
    ]


def kernel_cmdline(config: QemuConfig) -> str:
    """The kernel's: defaults, disks, shares, then the caller's words; the last of a kind wins."""
    emulated: tuple[str, ...] = _TCG_CMDLINE if config.accelerator == "tcg" else ()
    if _parks_cpus(config):
        emulated += (f"maxcpus={config.cpus}",)
    disks = (f"gcs.disk.{disk.name}={disk.fstype}" for disk in config.disks if disk.fstype)
    shares = (f"gcs.share.{share.tag}={'ro' if share.read_only else 'rw'}" for share, _ in config.shares)
    return " ".join((*_BASE_CMDLINE, *emulated, *disks, *shares, *config.cmdline))


def _machine(config: QemuConfig) -> list[str]:
    accel = "kvm" if config.accelerator == "kvm" else "tcg,thread=multi"
    cpu = "host" if config.accelerator == "kvm" else "max"
    # Daemons for vsock and shares read and write the guest's memory, so all of them must be able to map it.
    machine = f"{config.machine},usb=off,vmport=off,smbus=off,sata=off,dump-guest-core=off,memory-backend=ram"
    memory = ["-object", f"memory-backend-memfd,id=ram,size={config.memory_mib}M,share=on"]
    return [
        *("-machine", machine, "-accel", accel, "-cpu", cpu),
        *("-smp", _cpus(config), "-m", _memory(config), *memory),
    ]


def _cpus(config: QemuConfig) -> str:
    if config.max_cpus is None:
        return str(config.cpus)
    return str(config.max_cpus) if _parks_cpus(config) else f"{config.cpus},maxcpus={config.max_cpus}"


def _parks_cpus(config: QemuConfig) -> bool:
    """Whether CPUs to grow to are there from the start, for the guest to leave alone until it is told.

    Since 2025 (acpi_is_processor_usable, arch/x86/kernel/acpi/boot.c) Linux has CPUs plugged in only under a
    hypervisor that it knows, and TCG is none.
    """
    return config.accelerator == "tcg" and config.max_cpus is not None


def _memory(config: QemuConfig) -> str:
    if config.max_memory_mib in (None, config.memory_mib):
        return f"{config.memory_mib}M"
    return f"{config.memory_mib}M,slots={MEMORY_SLOTS},maxmem={config.max_memory_mib}M"


def _monitors(config: QemuConfig) -> list[str]:
    words = ["-chardev", f"socket,id=qmp,fd={config.qmp_fd}", "-mon", "chardev=qmp,mode=control"]
    if config.qmp_path is not None:
        words += ["-qmp", f"unix:{_value(str(config.qmp_path))},server=on,wait=off"]
    return words


def _vsock(config: QemuConfig) -> list[str]:
    # Devices on q35's own bus stay for good; one behind a root port can be unplugged.
    words = ["-device", f"pcie-root-port,id={VSOCK_PORT},chassis=1,slot=1"]
    if config.incoming:
        return words
    backend = str(config.vsock_fd)
    if config.vsock == "vhost-user-vsock":
        words += ["-chardev", f"socket,id={VSOCK_BACKEND},fd={config.vsock_fd}"]
        backend = VSOCK_BACKEND
    return [*words, "-device", json.dumps(vsock_device(config.vsock, config.vsock_cid, backend))]


def _hotplug_ports() -> list[str]:
    # Chassis and slot numbers name a port to the guest; the vsock device's is the first.
    return [
        word
        for number in range(HOTPLUG_PORTS)
        for word in (
            "-device",
            f"pcie-root-port,id={HOTPLUG_PORT}{number},chassis={number + 2},slot={number + 2},"
            f"addr={_HOTPLUG_SLOT:#x}.{number},multifunction={'on' if number == 0 else 'off'}",
        )
    ]


def vsock_device(kind: Kind, cid: int, backend: str) -> dict[str, Any]:
    """The vsock device's properties, for the command line and for QMP's device_add.

    Args:
        backend: id of the chardev for vhost-user-vsock; descriptor, by number or getfd name, for vhost-vsock.
    """
    place = {"id": VSOCK_DEVICE, "bus": VSOCK_PORT}
    if kind == "vhost-vsock":
        return {"driver": "vhost-vsock-pci", **place, "guest-cid": cid, "vhostfd": backend}
    return {"driver": "vhost-user-vsock-pci", **place, "chardev": backend}


def disk_name(serial: str) -> str:
    """Of a disk's device, and of the block node behind it."""
    return f"disk-{serial}"


def disk_node(path: Path, serial: str, *, read_only: bool) -> dict[str, Any]:
    """A raw image file or block device, as -blockdev and QMP's blockdev-add take it."""
    # A device's file is opened by another driver than a regular one's.
    driver = "host_device" if path.is_block_device() else "file"
    options = {"read-only": read_only, "discard": "unmap"}
    file = {"driver": driver, "filename": str(path), **options}
    return {"driver": "raw", "node-name": disk_name(serial), **options, "file": file}


def _disk(disk: Disk) -> list[str]:
    node = disk_name(disk.name)
    device = f"virtio-blk-pci,id={node},drive={node},serial={disk.name}"
    # JSON, because a path may hold anything, commas included.
    blockdev = disk_node(disk.path, disk.name, read_only=disk.read_only)
    return ["-blockdev", json.dumps(blockdev), "-device", device]


def share_name(tag: str) -> str:
    """Of a share's device, and of the chardev behind it."""
    return f"share-{tag}"


def share_device(tag: str) -> dict[str, Any]:
    """A share's properties, for the command line and for QMP's device_add."""
    name = share_name(tag)
    return {"driver": "vhost-user-fs-pci", "id": name, "chardev": name, "tag": tag}


def _share(share: Share, fd: int) -> list[str]:
    device = json.dumps(share_device(share.tag))
    return ["-chardev", f"socket,id={share_name(share.tag)},fd={fd}", "-device", device]


def _nic(nic: Nic) -> list[str]:
    return ["-netdev", json.dumps(nic_backend(nic)), "-device", json.dumps(nic_device(nic))]


def _value(text: str) -> str:
    return text.replace(",", ",,")
