"""Chooses the accelerator: KVM where it can really run a guest, else TCG.

/dev/kvm alone proves little: inside some VMs the device exists, and even creates vcpus, while the CPU offers
neither VMX nor SVM and a stock kernel dies in its decompressor. Hence three checks, cheapest first. What they
cannot foresee is caught by the launcher, which starts once more with TCG when a KVM guest dies silent.
"""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gcsagent.host.vm.errors import InvalidVmConfig

Accelerator = Literal["kvm", "tcg"]
Request = Literal["auto", "kvm", "tcg"]

KVM_DEVICE = Path("/dev/kvm")
CPUINFO = Path("/proc/cpuinfo")

# linux/kvm.h; _IO(KVMIO, nr) with KVMIO = 0xAE.
KVM_GET_API_VERSION = 0xAE00
KVM_CREATE_VM = 0xAE01
KVM_CREATE_VCPU = 0xAE41
KVM_API_VERSION = 12


@dataclass(frozen=True, slots=True)
class AccelChoice:
    """Which accelerator, why, and whether the launcher may fall back to TCG by itself."""

    name: Accelerator
    reason: str
    may_fall_back: bool = False

    def __str__(self) -> str:
        return f"{self.name.upper()} ({self.reason})"


def choose(request: str = "auto", *, device: Path | None = None, cpuinfo: Path | None = None) -> AccelChoice:
    """Picks the accelerator.

    Raises:
        InvalidVmConfig: `request` is none of auto, kvm, tcg; or it is kvm and KVM cannot work.
    """
    if request == "tcg":
        return AccelChoice("tcg", "asked for")
    if request not in ("auto", "kvm"):
        raise InvalidVmConfig(f"accelerator {request!r} is not one of auto, kvm, tcg")
    obstacle = kvm_obstacle(device or KVM_DEVICE, cpuinfo or CPUINFO)
    if request == "kvm":
        if obstacle is not None:
            raise InvalidVmConfig(f"KVM was asked for but cannot be used: {obstacle}; use auto or tcg")
        return AccelChoice("kvm", "asked for")
    if obstacle is not None:
        return AccelChoice("tcg", obstacle)
    return AccelChoice("kvm", "a vcpu can be created", may_fall_back=True)


def kvm_obstacle(device: Path, cpuinfo: Path) -> str | None:
    """Why KVM cannot be used here, or None if nothing speaks against it."""
    if not has_virtualization(cpuinfo):
        return f"neither vmx nor svm in {cpuinfo}"
    try:
        kvm = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return f"{device}: {error.strerror}"
    try:
        return _vcpu_obstacle(kvm, device)
    finally:
        os.close(kvm)


def has_virtualization(cpuinfo: Path) -> bool:
    """Whether the CPU's flags name Intel VMX or AMD SVM."""
    try:
        text = cpuinfo.read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    flags = next(
        (line.partition(":")[2].split() for line in text.splitlines() if line.startswith("flags")), []
    )
    return "vmx" in flags or "svm" in flags


def _vcpu_obstacle(kvm: int, device: Path) -> str | None:
    try:
        version = fcntl.ioctl(kvm, KVM_GET_API_VERSION)
        if version != KVM_API_VERSION:
            return f"{device} speaks KVM API {version}, not {KVM_API_VERSION}"
        vm = fcntl.ioctl(kvm, KVM_CREATE_VM, 0)
        try:
            os.close(fcntl.ioctl(vm, KVM_CREATE_VCPU, 0))
        finally:
            os.close(vm)
    except OSError as error:
        return f"{device} cannot create a vcpu: {error.strerror}"
    return None
