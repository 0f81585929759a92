"""Block devices: found in sysfs by serial number, PCI address, virtio name or node, and waited for."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat

from gcsagent.agent import uevents
from protocol.errors import Code, RpcError
from protocol.families.storage import Device


async def arrived(device: Device, seconds: float, field: str = "device") -> str:
    """The node of the device, as soon as it is there. Raises NOT_FOUND when it does not come."""
    with uevents.changes("block") as changed:
        try:
            async with asyncio.timeout(seconds):
                while (node := find(device)) is None:
                    await changed.wait()
                    changed.clear()
        except TimeoutError:
            raise RpcError(
                Code.NOT_FOUND,
                f"{field}: no disk {describe(device)} came within {seconds:g} s; there are:"
                f" {_what_there_is()}",
                field=field,
            ) from None
    return node


def describe(device: Device) -> str:
    if device.serial is not None:
        return f"with serial number {device.serial}"
    if device.pci is not None:
        return f"at PCI address {device.pci}"
    return f"called {device.virtio or device.path}"


def find(device: Device, sys: str = "/sys", dev: str = "/dev") -> str | None:
    """Its node, if it is there."""
    if device.path is not None:
        return _node(device.path)
    for name in _disks(sys):
        if _is(device, os.path.join(sys, "block", name), sys):
            return _node(os.path.join(dev, name.replace("!", "/")))
    return None


def _node(path: str) -> str | None:
    """Raises FAILED_PRECONDITION for what is no block device."""
    try:
        if stat.S_ISBLK(os.stat(path).st_mode):
            return path
    except FileNotFoundError:
        return None
    raise RpcError(Code.FAILED_PRECONDITION, f"device: {path} is no block device", field="device")


def _is(device: Device, entry: str, sys: str) -> bool:
    if device.serial is not None:
        return serial(entry) == device.serial
    parts = os.path.realpath(entry).split("/")
    if device.virtio is not None:
        return device.virtio in parts
    wanted = (device.pci or "").split("/")
    if ":" in wanted[0]:
        return _follows(parts, parts.index(wanted[0]) if wanted[0] in parts else -1, wanted)
    roots = [index for index, part in enumerate(parts) if part.startswith("pci")]
    return bool(roots) and _follows(parts, roots[0] + 1, wanted)


def _follows(parts: list[str], at: int, wanted: list[str]) -> bool:
    """Whether the functions from ``at`` on are those wanted, and none comes behind them."""
    if at < 0:
        return False
    functions = [part for part in parts[at:] if part.count(":") == 2 and part[-2:-1] == "."]
    return len(functions) == len(wanted) and all(
        function.endswith(name) for function, name in zip(functions, wanted, strict=True)
    )


def serial(entry: str) -> str:
    """virtio-blk has it beside the disk, NVMe and others one level below; empty without one."""
    for name in ("serial", "device/serial"):
        with contextlib.suppress(OSError), open(os.path.join(entry, name), encoding="ascii") as file:
            return file.read().strip("\0 \n")
    return ""


def _disks(sys: str) -> list[str]:
    try:
        return sorted(os.listdir(os.path.join(sys, "block")))
    except FileNotFoundError:
        return []


def _what_there_is() -> str:
    found = []
    for name in _disks("/sys"):
        entry = os.path.join("/sys/block", name)
        if os.path.exists(os.path.join(entry, "device")):
            found.append(f"{name} ({serial(entry) or 'no serial number'})")
    return ", ".join(found[:32]) or "none"
