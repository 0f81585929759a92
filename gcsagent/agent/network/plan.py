"""From what a namespace has to what it shall have: the ``ip`` commands, each with what takes it back.

Pure functions. What is so already takes no step, which is what makes a request that is sent again change
nothing. A route is one by its network and metric; those this agent has made bear its protocol number
(rtnetlink(7): 71 is nobody's), so that nobody else's are removed.
"""

from __future__ import annotations

import ipaddress

from gcsagent.agent.network.kernel import IPV6_METRIC, Link, Snapshot, canonical, destination
from protocol.dataclass import dataclass, replace
from protocol.errors import Code, RpcError
from protocol.families.network import ApplyNetwork, Interface, Neighbour, Route, RouteState

PROTOCOL = "71"


@dataclass(frozen=True, slots=True)
class Step:
    """Lines of ``ip -batch``; ``undo`` is empty where there is nothing to take back."""

    do: str
    undo: str
    field: str


def steps(wanted: ApplyNetwork, now: Snapshot) -> list[Step]:
    """Raises RpcError NOT_FOUND for a name of an interface that is not there."""
    made: list[Step] = []
    for index, interface in enumerate(wanted.interfaces):
        made += interface_steps(interface, now, f"interfaces[{index}]")
    orphans = _orphans(wanted, now)
    now = replace(now, routes=tuple(route for route in now.routes if route not in orphans))
    # An interface that goes down takes its routes along.
    disturbed = any(step.do.endswith(" down") for step in made)
    first = [Step(_route_line("del", each), _route_line("replace", each), "interfaces") for each in orphans]
    return [*first, *made, *_route_steps(wanted, now, disturbed), *_neighbour_steps(wanted, now)]


def settings(wanted: ApplyNetwork, now: Snapshot) -> dict[str, str]:
    """Sysctls to set before the steps: without them an IPv4 address takes the others of its subnet along,
    and the last one all routes of its interface (ip-sysctl.rst)."""
    return {
        f"net/ipv4/conf/{name}/promote_secondaries": "1"
        for name, (going, _) in _changed(wanted, now).items()
        if any(":" not in each for each in going)
    }


def _orphans(wanted: ApplyNetwork, now: Snapshot) -> list[RouteState]:
    """Routes that the kernel drops with an address: those that send from it, and with an interface's last
    IPv4 address all of that family. Nothing would bring them back if the request failed."""
    found = []
    for name, (going, shall) in _changed(wanted, now).items():
        gone = {each.split("/")[0] for each in going}
        last = any(":" not in each for each in going) and all(":" in each for each in shall)
        for each in now.routes:
            flushed = last and (each.family, each.interface) == (4, name)
            if each.protocol != "kernel" and (flushed or each.source in gone):
                found.append(each)
    return found


def _changed(wanted: ApplyNetwork, now: Snapshot) -> dict[str, tuple[list[str], list[str]]]:
    """By interface, the addresses that go and those there shall be."""
    found = {}
    for each in wanted.interfaces:
        if each.addresses is not None and each.name in now.links:
            shall = list(dict.fromkeys(canonical(address) for address in each.addresses))
            found[each.name] = ([own for own in now.links[each.name].own if own not in shall], shall)
    return found


# -- interfaces -----------------------------------------------------------------------------------


def interface_steps(wanted: Interface, now: Snapshot, field: str) -> list[Step]:
    link = _there(now, wanted.name, f"{field}.name")
    made = [*_link_steps(wanted, link, now, field)]
    if wanted.addresses is not None:
        made += _address_steps(wanted, link, f"{field}.addresses")
    if wanted.up != link.state.up:
        set_, back = ("up", "down") if wanted.up else ("down", "up")
        made.append(_set(wanted.name, set_, back, f"{field}.up"))
    return made


def _link_steps(wanted: Interface, link: Link, now: Snapshot, field: str) -> list[Step]:
    made, state, name = [], link.state, wanted.name
    if wanted.mac is not None and _is_made(wanted) and wanted.mac.lower() != state.mac:
        made.append(_set(name, f"address {wanted.mac.lower()}", f"address {state.mac}", f"{field}.mac"))
    if wanted.mtu is not None and wanted.mtu != state.mtu:
        made.append(_set(name, f"mtu {wanted.mtu}", f"mtu {state.mtu}", f"{field}.mtu"))
    if wanted.master is not None and wanted.master != state.master:
        _there(now, wanted.master, f"{field}.master")
        back = f"master {state.master}" if state.master else "nomaster"
        made.append(_set(name, f"master {wanted.master}", back, f"{field}.master"))
    return made


def _is_made(wanted: Interface) -> bool:
    return wanted.bridge or wanted.veth is not None


def _address_steps(wanted: Interface, link: Link, field: str) -> list[Step]:
    assert wanted.addresses is not None
    shall, name = list(dict.fromkeys(canonical(each) for each in wanted.addresses)), wanted.name
    made = [
        Step(_add_address(each, name), _del_address(each, name), f"{field}[{index}]")
        for index, each in enumerate(shall)
        if each not in link.state.addresses
    ]
    going = [each for each in link.own if each not in shall]
    return made + [Step(_del_address(each, name), _add_address(each, name), field) for each in going]


def _add_address(each: str, name: str) -> str:
    found = ipaddress.ip_interface(each)
    # An address the caller has assigned is usable at once: nobody is asked whether he has it (RFC 4862, 5.4).
    extra = " nodad" if found.version == 6 else " broadcast +" if found.network.prefixlen < 31 else ""
    return f"address add {each}{extra} dev {name}"


def _del_address(each: str, name: str) -> str:
    return f"address del {each} dev {name}"


def _set(name: str, do: str, undo: str, field: str) -> Step:
    return Step(f"link set dev {name} {do}", f"link set dev {name} {undo}", field)


def network_of(interface_address: str) -> str:
    return str(ipaddress.ip_interface(interface_address).network)


# -- routes ---------------------------------------------------------------------------------------


def _route_steps(wanted: ApplyNetwork, now: Snapshot, disturbed: bool) -> list[Step]:
    if wanted.routes is None:
        return []
    addresses = _addresses(wanted, now)
    shall = [_route(each, addresses, now, f"routes[{i}]") for i, each in enumerate(wanted.routes)]
    has = {_key(route): route for route in now.routes}
    made = []
    for index, route in enumerate(shall):
        before = has.get(_key(route))
        if disturbed or before is None or not _same(before, route):
            undo = _route_line("replace", before) if before else _route_line("del", route)
            made.append(Step(_route_line("replace", route), undo, f"routes[{index}]"))
    kept = {_key(route) for route in shall}
    for route in now.routes:
        if route.protocol == PROTOCOL and _key(route) not in kept:
            made.append(Step(_route_line("del", route), _route_line("replace", route), "routes"))
    return made


def _route(wanted: Route, addresses: dict[str, list[str]], now: Snapshot, field: str) -> RouteState:
    """What the kernel will say of it."""
    hint = next((each for each in (wanted.via, wanted.source) if each), "0.0.0.0")
    by = hint if wanted.to == "default" else wanted.to
    family = 6 if ":" in by else 4
    via = str(ipaddress.ip_address(wanted.via)) if wanted.via else ""
    interface = wanted.interface or _interface_for(via, addresses)
    if not interface:
        raise RpcError(
            Code.INVALID_ARGUMENT,
            f"{field}.interface: no interface has {wanted.via or wanted.to} in a subnet of its own;"
            " say which one the route leaves by",
            field=f"{field}.interface",
        )
    if interface not in addresses:
        _there(now, interface, f"{field}.interface")
    return RouteState(
        to=destination(wanted.to, family),
        family=family,
        via=via,
        interface=interface,
        source=str(ipaddress.ip_address(wanted.source)) if wanted.source else "",
        metric=wanted.metric if wanted.metric is not None else (IPV6_METRIC if family == 6 else 0),
        protocol=PROTOCOL,
        onlink=bool(via) and _interface_for(via, {interface: addresses.get(interface, [])}) != interface,
    )


def _interface_for(address: str, addresses: dict[str, list[str]]) -> str:
    """The interface that has a subnet with this address in it; link-local addresses are on every link."""
    if not address:
        return ""
    found = ipaddress.ip_address(address)
    if found.version == 6 and found.is_link_local and len(addresses) == 1:
        return next(iter(addresses))
    for name, own in addresses.items():
        if any(found in ipaddress.ip_interface(each).network for each in own):
            return name
    return ""


def _addresses(wanted: ApplyNetwork, now: Snapshot) -> dict[str, list[str]]:
    """Of each interface, as they will be."""
    found = {name: list(link.state.addresses) for name, link in now.links.items()}
    for interface in wanted.interfaces:
        if interface.addresses is not None:
            found[interface.name] = list(interface.addresses)
    return found


def _key(route: RouteState) -> tuple[int, str, int]:
    return route.family, route.to, route.metric


def _same(has: RouteState, shall: RouteState) -> bool:
    """The kernel tells the source of some routes that were given none."""
    return has == shall or (not shall.source and _sourceless(has) == shall)


def _sourceless(route: RouteState) -> RouteState:
    return RouteState(
        route.to, route.family, route.via, route.interface, "", route.metric, route.protocol, route.onlink
    )


def _route_line(action: str, route: RouteState) -> str:
    to = route.to if route.to != "default" else ("0.0.0.0/0" if route.family == 4 else "::/0")
    words = ["route", action, to]
    words += ["via", route.via] if route.via else []
    words += ["dev", route.interface] if route.interface else []
    words += ["src", route.source] if route.source else []
    words += ["metric", str(route.metric)] if route.metric else []
    words += ["protocol", route.protocol] if route.protocol else []
    words += ["onlink"] if route.onlink and action != "del" else []
    return " ".join(words)


# -- neighbours -----------------------------------------------------------------------------------


def _neighbour_steps(wanted: ApplyNetwork, now: Snapshot) -> list[Step]:
    if wanted.neighbours is None:
        return []
    shall = {_neighbour_key(each): each for each in wanted.neighbours}
    has = {_neighbour_key(each): each for each in now.neighbours}
    made = []
    for index, (key, each) in enumerate(shall.items()):
        _there(now, each.interface, f"neighbours[{index}].interface")
        before = has.get(key)
        if before is None or before.mac.lower() != each.mac.lower():
            undo = _neighbour_line("replace", before) if before else _neighbour_line("del", each)
            made.append(Step(_neighbour_line("replace", each), undo, f"neighbours[{index}]"))
    for key, each in has.items():
        if key not in shall:
            made.append(Step(_neighbour_line("del", each), _neighbour_line("replace", each), "neighbours"))
    return made


def _neighbour_key(each: Neighbour) -> tuple[str, str]:
    return str(ipaddress.ip_address(each.address)), each.interface


def _neighbour_line(action: str, each: Neighbour) -> str:
    what = f"neigh {action} {each.address} dev {each.interface}"
    return what if action == "del" else f"{what} lladdr {each.mac} nud permanent"


def _there(now: Snapshot, name: str, field: str) -> Link:
    link = now.links.get(name)
    if link is None:
        have = ", ".join(now.links) or "none"
        raise RpcError(
            Code.NOT_FOUND, f"{field}: there is no interface {name} (there are: {have})", field=field
        )
    return link
