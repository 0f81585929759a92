"""A VM's network cards, and QEMU's user-mode network behind them.

User-mode networking (QEMU docs, devices/net.html) needs no privilege and changes nothing on the host: the
guest's connections leave as QEMU's own, and nobody can connect to the guest. The addresses are its defaults.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from typing import Any

from gcsagent.host.vm.errors import InvalidVmConfig

NETWORKS = ("none", "user")

USER_ADDRESS = "10.0.2.15/24"
USER_GATEWAY = "10.0.2.2"
"""The host, too: its services on localhost are reached there."""
USER_DNS = "10.0.2.3"

NIC = "nic-"

_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}\Z")


@dataclass(frozen=True, slots=True)
class Nic:
    """One card, known by its MAC address, in QEMU too."""

    mac: str

    def __post_init__(self) -> None:
        if not _MAC.match(self.mac) or int(self.mac[:2], 16) & 1:
            raise InvalidVmConfig(f"{self.mac!r} must be one card's MAC address, like 52:54:00:12:34:56")

    @classmethod
    def named(cls, name: str) -> Nic:
        """The card whose device in QEMU has this id."""
        digits = name.removeprefix(NIC)
        return cls(":".join(digits[at : at + 2] for at in range(0, len(digits), 2)))

    @property
    def name(self) -> str:
        """The id of its device."""
        return NIC + self.mac.replace(":", "")

    @property
    def backend(self) -> str:
        """The id of what the card is connected to."""
        return f"net-{self.name}"


def new_mac() -> str:
    """A random one of QEMU's range."""
    return "52:54:00:" + ":".join(f"{byte:02x}" for byte in secrets.token_bytes(3))


def nic_backend(nic: Nic) -> dict[str, Any]:
    """The arguments of -netdev and netdev_add."""
    return {"type": "user", "id": nic.backend}


def nic_device(nic: Nic) -> dict[str, Any]:
    """The arguments of -device and device_add. Nothing boots from it, so it needs no ROM."""
    return {
        "driver": "virtio-net-pci",
        "id": nic.name,
        "netdev": nic.backend,
        "mac": nic.mac,
        "romfile": "",
    }
