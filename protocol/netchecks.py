"""What values of ``network.*`` must look like. The words are iproute2's.

``ipaddress`` is imported where it is needed: few agents are asked for it, and it is as large as the rest.
"""

from __future__ import annotations

import re
from typing import Annotated

_IFNAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,14}\Z")
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}\Z")
_SYSCTL = re.compile(r"net[./][A-Za-z0-9_]+([./][A-Za-z0-9_-]+)+\Z")
DEFAULT = "default"


def ifname(value: str) -> str | None:
    """IFNAMSIZ is 16 with the NUL; ``all`` and ``default`` are directories of /proc/sys/net beside names."""
    if not _IFNAME.match(value) or value in ("all", DEFAULT):
        return "must be an interface's name: 1 to 15 letters, digits, '_', '.' or '-', no '.' or '-' first"
    return None


def mac(value: str) -> str | None:
    if not _MAC.match(value.lower()):
        return "must be a MAC address, like 52:54:00:12:34:56"
    if int(value[:2], 16) & 1 or value.replace(":", "") == "0" * 12:
        return "must be the MAC address of one interface, not of a group or of none"
    return None


def interface_address(value: str) -> str | None:
    import ipaddress

    try:
        ipaddress.ip_interface(_no_zone(value))
    except ValueError:
        return "must be an address with its prefix length, like 10.0.2.15/24 or fd00::2/64"
    if "/" not in value or not value.rpartition("/")[2].isdigit():
        return "must have a prefix length, like 10.0.2.15/24 or fd00::2/64"
    return None


def subnet(value: str) -> str | None:
    import ipaddress

    problem = interface_address(value)
    if problem is not None:
        return "must be a network with its prefix length, like 10.88.0.0/16 or fd00::/64"
    try:
        ipaddress.ip_network(value)
    except ValueError:
        network = ipaddress.ip_interface(value).network
        return f"has bits set behind its prefix: {network} may be meant"
    return None


def destination(value: str) -> str | None:
    return None if value == DEFAULT else subnet(value)


def sysctls(value: dict[str, str]) -> str | None:
    for key, text in value.items():
        if not _SYSCTL.match(key) or ".." in key:
            return f"has {key!r}: only sysctls below net. can be set here, like net.ipv4.ip_forward"
        if not text or not text.isprintable() or len(text) > 256:
            return f"has a value for {key} that is not one line of 1 to 256 characters"
    return None


def _no_zone(value: str) -> str:
    """``%eth0`` behind an address has no meaning on the other side of a wire."""
    if "%" in value:
        raise ValueError(value)
    return value


Ifname = Annotated[str, ifname]
Mac = Annotated[str, mac]
InterfaceAddress = Annotated[str, interface_address]
Subnet = Annotated[str, subnet]
Destination = Annotated[str, destination]
Sysctls = Annotated[dict[str, str], sysctls]
