"""Block devices: found in sysfs by serial number, PCI address, virtio name or node, and waited for.

The kernel tells of each device that comes over a netlink socket (NETLINK_KOBJECT_UEVENT, netlink(7)), after
it has made the device's node and attributes. The socket is there before the first look, so that nothing
can come between the two.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
from collections.abc import Iterator

from protocol.errors import Code, RpcError
from protocol.families.storage import Device

_KERNEL_GROUP = 1
"""Multicast group of the kernel's own uevents; those of a udev are in group 2."""

_NETLINK_KOBJECT_UEVENT = 15
"""linux/netlink.h; Python has no name for it."""

_RECEIVE = 64 * 1024


class DeviceArrivals:
    """Tells whoever waits that something has changed among the devices."""

    def __init__(self) -> None:
        self._waiting: set[asyncio.Event] = set()
        self._sock: socket.socket | None = None

    @contextlib.contextmanager
    def changes(self) -> Iterator[asyncio.Event]:
        """An event that is set whenever a block device came or went. Raises OSError."""
        event = asyncio.Event()
        if self._sock is None:
            self._sock = _uevents()
            asyncio.get_running_loop().add_reader(self._sock, self._read)
        self._waiting.add(event)
        try:
            yield event
        finally:
            self._waiting.discard(event)
            if not self._waiting and self._sock is not None:
                asyncio.get_running_loop().remove_reader(self._sock)
                self._sock.close()
                self._sock = None

    def _read(self) -> None:
        assert self._sock is not None
        try:
            message = self._sock.recv(_RECEIVE)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            message = b"SUBSYSTEM=block"  # some were dropped: perhaps the one that is waited for
        if b"SUBSYSTEM=block" in message.split(b"\0"):
            for event in self._waiting:
                event.set()


def _uevents() -> socket.socket:
    sock = socket.socket(
        socket.AF_NETLINK,
        socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC,
        _NETLINK_KOBJECT_UEVENT,
    )
    try:
        sock.bind((0, _KERNEL_GROUP))
    except BaseException:
        sock.close()
        raise
    return sock


async def arrived(arrivals: DeviceArrivals, device: Device, seconds: float, field: str = "device") -> str:
    """The node of the device, as soon as it is there. Raises NOT_FOUND when it does not come."""
    with arrivals.changes() as changed:
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
