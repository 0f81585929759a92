"""What the values of ``storage.*`` must look like: field checks for :mod:`protocol.schema`."""

from __future__ import annotations

import re
from typing import Annotated

from protocol.checks import absolute_path


def exact_path(value: str) -> str | None:
    """Absolute, and as the kernel would write it: what is mounted where must have one name."""
    problem = absolute_path(value)
    if problem is not None:
        return problem
    if value == "/" or any(part in ("", ".", "..") for part in value[1:].split("/")):
        return "must be a path below /, without '.', '..', empty parts or a slash at its end"
    return None


_OPTION = re.compile(r"[A-Za-z0-9_.:/@%+=-]{1,256}\Z")


def mount_option(value: str) -> str | None:
    return None if _OPTION.match(value) else "must be one option of mount(8), like noatime, without a comma"


_PCI = re.compile(r"([0-9a-f]{4}:[0-9a-f]{2}:)?[0-9a-f]{2}\.[0-7](/[0-9a-f]{2}\.[0-7]){0,7}\Z")


def pci_path(value: str) -> str | None:
    """A function by its address, or by the slots on the way to it: stable, whatever numbers buses get."""
    if _PCI.match(value):
        return None
    return "must be a PCI address like 0000:01:00.0, or a path of slots like 02.1/00.0"


_VIRTIO = re.compile(r"virtio[0-9]{1,5}\Z")


def virtio_name(value: str) -> str | None:
    return None if _VIRTIO.match(value) else "must be a virtio device's name, like virtio3"


def device_name(value: str) -> str | None:
    """A serial number or a virtiofs tag: a device's own bytes, of which it keeps 20 or 36."""
    return None if 0 < len(value) <= 64 and value.isprintable() else "must be 1 to 64 printable characters"


_HASH = re.compile(r"([0-9a-f]{2}){16,64}\Z")


def root_hash(value: str) -> str | None:
    return None if _HASH.match(value) else "must be 32 to 128 lower-case hex digits, as veritysetup prints"


ExactPath = Annotated[str, exact_path]
MountOption = Annotated[str, mount_option]
PciPath = Annotated[str, pci_path]
VirtioName = Annotated[str, virtio_name]
DeviceName = Annotated[str, device_name]
RootHash = Annotated[str, root_hash]
