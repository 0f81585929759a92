"""What a network namespace has now: the output of ``ip -json``, as far as it matters here."""

from __future__ import annotations

import ipaddress
from typing import Any

from gcsagent.agent.network.tools import Namespace, Tools
from protocol.dataclass import dataclass
from protocol.families.network import InterfaceState, Neighbour, RouteState

LINKS = ["ip", "-json", "-details", "address", "show"]
ROUTES = {
    4: ["ip", "-4", "-json", "route", "show", "table", "main"],
    6: ["ip", "-6", "-json", "route", "show", "table", "main"],
}
NEIGHBOURS = ["ip", "-json", "neigh", "show", "nud", "permanent"]

IPV6_METRIC = 1024
"""Of a route that is given none, ip-route(8)."""


@dataclass(frozen=True, slots=True)
class Link:
    state: InterfaceState
    own: tuple[str, ...] = ()
    """Addresses somebody has given it: neither link-local ones of the kernel nor from advertisements."""
    macs: tuple[str, ...] = ()
    """The address it has, and the one it came with."""
    peer_index: int = 0
    """Of a cable, the other end's number in the namespace that is in."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    links: dict[str, Link]
    """By name."""
    routes: tuple[RouteState, ...] = ()
    neighbours: tuple[Neighbour, ...] = ()


async def links(tools: Tools, namespace: Namespace, timeout: float) -> dict[str, Link]:
    """The interfaces, by name, in the order of their numbers."""
    found = await tools.ask_json(namespace, LINKS, timeout)
    return {link.state.name: link for link in parse_links(found[0] if found else [])}


async def routes(tools: Tools, namespace: Namespace, timeout: float) -> tuple[RouteState, ...]:
    made: list[RouteState] = []
    for family, argv in ROUTES.items():
        found = await tools.ask_json(namespace, argv, timeout)
        made += parse_routes(found[0] if found else [], family)
    return tuple(made)


async def neighbours(tools: Tools, namespace: Namespace, timeout: float) -> tuple[Neighbour, ...]:
    found = await tools.ask_json(namespace, NEIGHBOURS, timeout)
    return parse_neighbours(found[0] if found else [])


def parse_links(documents: list[dict[str, Any]]) -> list[Link]:
    return [_link(each) for each in documents if "ifname" in each]


def _link(each: dict[str, Any]) -> Link:
    flags = each.get("flags", ())
    given = [entry for entry in each.get("addr_info", ()) if "local" in entry]
    info = each.get("linkinfo", {})
    link_type = each.get("link_type", "")
    mac = each.get("address", "") if link_type == "ether" else ""
    state = InterfaceState(
        name=each["ifname"],
        mac=mac,
        kind=info.get("info_kind", "") or ("loopback" if link_type == "loopback" else ""),
        index=each.get("ifindex", 0),
        mtu=each.get("mtu", 0),
        up="UP" in flags,
        running="LOWER_UP" in flags,
        master=each.get("master", ""),
        alias=each.get("ifalias", ""),
        addresses=tuple(_address(entry) for entry in given),
    )
    own = tuple(_address(entry) for entry in given if _is_own(entry))
    macs = tuple(dict.fromkeys(filter(None, (mac, each.get("permaddr", "")))))
    return Link(state, own, macs, each.get("link_index", 0))


def _address(entry: dict[str, Any]) -> str:
    return canonical(f"{entry['local']}/{entry['prefixlen']}")


def _is_own(entry: dict[str, Any]) -> bool:
    by_kernel = entry["family"] == "inet6" and entry.get("scope") == "link"
    return not (by_kernel or entry.get("dynamic") or entry.get("temporary") or entry.get("scope") == "host")


def parse_routes(documents: list[dict[str, Any]], family: int) -> list[RouteState]:
    return [
        RouteState(
            to=destination(each["dst"], family),
            family=family,
            via=each.get("gateway", "") or str(each.get("via", {}).get("host", "")),
            interface=each.get("dev", ""),
            source=each.get("prefsrc", ""),
            metric=each.get("metric", 0),
            protocol=str(each.get("protocol", "")),
            onlink="onlink" in each.get("flags", ()),
        )
        for each in documents
        if "dst" in each and each.get("type", "unicast") == "unicast"
    ]


def parse_neighbours(documents: list[dict[str, Any]]) -> tuple[Neighbour, ...]:
    return tuple(
        Neighbour(each["dst"], each["lladdr"], each["dev"])
        for each in documents
        if "lladdr" in each and "dst" in each
    )


def canonical(interface_address: str) -> str:
    """One spelling for each: what two are compared by."""
    return ipaddress.ip_interface(interface_address).with_prefixlen


def destination(text: str, family: int) -> str:
    """``default``, or a network with its prefix length, which ip leaves out for a single address."""
    if text in ("default", "0.0.0.0/0", "::/0"):
        return "default"
    if "/" not in text:
        text = f"{text}/{32 if family == 4 else 128}"
    return str(ipaddress.ip_network(text, strict=False))
