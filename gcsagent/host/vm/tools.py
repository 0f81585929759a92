"""Finds what a VM is made of: QEMU, the daemons for vsock and shares, mkfs.erofs, and the guest image.

Looked for in this order: the environment (GCS_QEMU, GCS_VHOST_DEVICE_VSOCK, GCS_VIRTIOFSD, GCS_MKFS_EROFS,
GCS_IMAGE), the cache directory that `make tools` and `scripts/build-rootfs.sh` fill, then PATH.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gcsagent.host.vm.accel import Accelerator
from gcsagent.host.vm.errors import ToolMissing, UnsuitableTool
from gcsagent.host.vm.places import home, xdg

QEMU = "qemu-system-x86_64"
VHOST_DEVICE_VSOCK = "vhost-device-vsock"
VIRTIOFSD = "virtiofsd"
MKFS_EROFS = "mkfs.erofs"

_VARIABLES = {
    QEMU: "GCS_QEMU",
    VHOST_DEVICE_VSOCK: "GCS_VHOST_DEVICE_VSOCK",
    VIRTIOFSD: "GCS_VIRTIOFSD",
    MKFS_EROFS: "GCS_MKFS_EROFS",
}
_REMEDIES = {MKFS_EROFS: "install erofs-utils"}

# Under TCG, 7.2 corrupts flags on cmpxchg16b and 8.0 translates code it does not hold the page lock for
# (fixed in 8.1): both end in random guest panics. With KVM neither code path is used.
TCG_OLDEST_QEMU = (8, 1)

_VERSION_DEADLINE = 20.0

# Documentation/arch/x86/boot.rst: the setup header's magic, at 0x202.
_BZIMAGE = b"HdrS"
_VMLINUX = b"\x7fELF"

# lib/decompress.c's table, which knows an initramfs by its first bytes, and cpio "newc" itself.
_ARCHIVES = (b"070701", b"\x28\xb5", b"\x1f\x8b", b"\xfd7", b"\x5d\x00", b"BZ", b"\x02\x21", b"\x89L")


@dataclass(frozen=True, slots=True)
class GuestImage:
    """A guest image directory as `scripts/build-rootfs.sh` leaves it."""

    directory: Path
    kernel: Path
    initramfs: Path


def cache_dir(env: Mapping[str, str] | None = None) -> Path:
    """The product's cache directory: GCS_CACHE, else gcsagent/ in XDG_CACHE_HOME or ~/.cache."""
    env = os.environ if env is None else env
    if env.get("GCS_CACHE"):
        return Path(env["GCS_CACHE"])
    return (xdg("XDG_CACHE_HOME", env) or home() / ".cache") / "gcsagent"


def make_environment_absolute() -> None:
    """For a process that is about to work in another directory: its variables mean the same there."""
    for name in ("GCS_CACHE", "GCS_IMAGE", *_VARIABLES.values()):
        value = os.environ.get(name, "")
        # A program's name alone is looked for in PATH.
        if value and ("/" in value or name not in _VARIABLES.values()):
            os.environ[name] = os.path.abspath(value)


def find_tool(name: str, env: Mapping[str, str] | None = None) -> Path:
    """The path of program `name`.

    Raises:
        ToolMissing: it is nowhere, or the environment variable names something that cannot be run.
    """
    env = os.environ if env is None else env
    variable = _VARIABLES.get(name)
    if variable and env.get(variable):
        chosen = shutil.which(env[variable], path=env.get("PATH"))
        if chosen is None:
            raise ToolMissing(f"{variable}={env[variable]} is not an executable file")
        return Path(chosen)
    folder = cache_dir(env) / "tools" / "current" / "bin"
    found = shutil.which(name, path=f"{folder}{os.pathsep}{env.get('PATH', os.defpath)}")
    if found is None:
        remedy = _REMEDIES.get(name, "run `make tools` (scripts/fetch-tools.sh)")
        hint = f", or set {variable}" if variable else ""
        raise ToolMissing(f"{name} is neither in {folder} nor in PATH: {remedy}{hint}")
    return Path(found)


def find_image(
    directory: Path | None = None, kernel: Path | None = None, env: Mapping[str, str] | None = None
) -> GuestImage:
    """The guest image in `directory`, else GCS_IMAGE, else the cache; with `kernel` in place of its own.

    Raises:
        ToolMissing: the directory lacks the kernel or the initramfs, or there is no such kernel.
        UnsuitableTool: they are something else.
    """
    env = os.environ if env is None else env
    if directory is None:
        named = env.get("GCS_IMAGE")
        directory = Path(named) if named else cache_dir(env) / "image" / "current"
    if kernel is not None and not kernel.is_file():
        raise ToolMissing(f"there is no kernel {kernel}")
    image = GuestImage(directory, kernel or directory / "vmlinuz", directory / "initramfs")
    for part in (image.kernel, image.initramfs):
        if not part.is_file():
            raise ToolMissing(
                f"no guest image: {part} is missing; run scripts/build-rootfs.sh or set GCS_IMAGE"
            )
    if _bytes(image.kernel, 0x202, 4) != _BZIMAGE and _bytes(image.kernel, 0, 4) != _VMLINUX:
        raise UnsuitableTool(f"{image.kernel} is no Linux kernel for x86 (bzImage or vmlinux)")
    if not _bytes(image.initramfs, 0, 6).startswith(_ARCHIVES):
        raise UnsuitableTool(
            f"{image.initramfs} is no initramfs: neither a cpio archive nor a compressed one"
        )
    return image


def _bytes(path: Path, at: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(at)
        return file.read(size)


def qemu_version(qemu: Path) -> tuple[int, int, int]:
    """The version `qemu --version` reports.

    Raises:
        UnsuitableTool: it does not run, or says something else.
    """
    try:
        done = subprocess.run(
            [qemu, "--version"], capture_output=True, text=True, timeout=_VERSION_DEADLINE, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnsuitableTool(f"{qemu} --version does not run: {error}") from error
    match = re.search(r"version (\d+)\.(\d+)\.(\d+)", done.stdout)
    if match is None:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise UnsuitableTool(f"{qemu} --version exits {done.returncode}: {said[0] if said else 'no output'}")
    return int(match[1]), int(match[2]), int(match[3])


def check_qemu(qemu: Path, accelerator: Accelerator) -> str:
    """The version as text, if this QEMU can be trusted with a guest under `accelerator`.

    Raises:
        UnsuitableTool: it runs guests wrongly under TCG, or does not run.
    """
    version = qemu_version(qemu)
    text = ".".join(map(str, version))
    if accelerator == "tcg" and version[:2] < TCG_OLDEST_QEMU:
        oldest = ".".join(map(str, TCG_OLDEST_QEMU))
        raise UnsuitableTool(
            f"QEMU {text} at {qemu} corrupts guests under TCG (needs {oldest} or later): "
            "run `make tools` for a newer one, or set GCS_QEMU"
        )
    return text
