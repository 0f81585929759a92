"""Gets an interface to where it shall be: found by address or name, moved, renamed, or made.

Looked for first, all of them, and only then is anything changed: a request that waits for one of its
interfaces has not touched the others.
"""

from __future__ import annotations

import hashlib

from gcsagent.agent.network.kernel import Link
from gcsagent.agent.network.plan import Step
from gcsagent.agent.network.tools import OTHER
from protocol.dataclass import dataclass
from protocol.errors import Code, RpcError
from protocol.families.network import Interface

Links = dict[str, Link]


class NotYet(Exception):
    """An interface is not there; the RpcError says so if nobody waits for it."""

    def __init__(self, field: str, what: str, have: Links) -> None:
        names = [f"{name} {link.state.mac}".strip() for name, link in have.items()]
        self.error = RpcError(
            Code.NOT_FOUND,
            f"{field}: there is no interface {what} (there are: {', '.join(names)}); plug it in, and give"
            " wait_ms to wait for it",
            field=field,
        )
        super().__init__(str(self.error))


@dataclass(frozen=True, slots=True)
class Placing:
    """Steps in the namespace the interface is found or the other end of its cable belongs in.

    ``where`` is "target", "guest", or the container the other end goes to; OTHER in the steps is the
    namespace of the request, but for "target", where it is the guest's.
    """

    where: str
    steps: tuple[Step, ...]


def placing(
    wanted: Interface, target: Links, guest: Links, same: bool, container: str, field: str
) -> Placing:
    """What has to be done first; no steps when it is in place.

    ``same`` says that the request is about the guest itself, and ``target`` is ``guest``. Raises NotYet, or
    RpcError for what can never be.
    """
    _check(wanted, field)
    if wanted.bridge:
        return _bridge(wanted, target, field)
    if wanted.veth is not None:
        return _veth(wanted, target, guest, container, field)
    return _device(wanted, target, guest, same, field)


def _check(wanted: Interface, field: str) -> None:
    ways = {"veth": wanted.veth is not None, "bridge": wanted.bridge, "device": wanted.device is not None}
    given = [way for way, there in ways.items() if there]
    if len(given) > 1 or (wanted.device and wanted.mac):
        raise RpcError(
            Code.INVALID_ARGUMENT,
            f"{field}: give one of veth, bridge, device and mac (mac may go with veth and bridge)",
            field=field,
        )
    veth = wanted.veth
    if veth is not None and veth.container is not None and veth.bridge is not None:
        raise RpcError(
            Code.INVALID_ARGUMENT,
            f"{field}.veth.bridge: is in the guest, so the other end cannot be in a container",
            field=f"{field}.veth.bridge",
        )


def _bridge(wanted: Interface, target: Links, field: str) -> Placing:
    link = target.get(wanted.name)
    if link is not None:
        _must_be("bridge", link, field)
        return Placing("target", ())
    mac = f" address {wanted.mac.lower()}" if wanted.mac else ""
    do = f"link add name {wanted.name}{mac} type bridge"
    return Placing("target", (Step(do, f"link del dev {wanted.name}", f"{field}.bridge"),))


def peer_name(container: str, interface: str) -> str:
    """As long as a name may be, and the same each time: by it the other end is known again."""
    return "gcs" + hashlib.sha256(f"{container}/{interface}".encode()).hexdigest()[:12]


def _veth(wanted: Interface, target: Links, guest: Links, container: str, field: str) -> Placing:
    assert wanted.veth is not None
    veth = wanted.veth
    peer = veth.peer or peer_name(container, wanted.name)
    link = target.get(wanted.name)
    where = veth.container or "guest"
    steps = []
    if link is None:
        if veth.container is None and peer in guest:
            raise _taken(peer, guest[peer], f"{field}.veth.peer")
        mac = f" address {wanted.mac.lower()}" if wanted.mac else ""
        do = f"link add name {peer} type veth peer name {wanted.name} netns {OTHER}{mac}"
        steps.append(Step(do, f"link del dev {peer}", f"{field}.veth"))
        steps.append(Step(f"link set dev {peer} up", "", f"{field}.veth"))
    else:
        _must_be("veth", link, field)
        other = guest.get(peer)
        if veth.container is None and (other is None or other.state.index != link.peer_index):
            raise RpcError(
                Code.FAILED_PRECONDITION,
                f"{field}.veth: {wanted.name} is there, and its other end is not {peer} in the guest; remove"
                " it first",
                field=f"{field}.veth",
            )
    master = guest[peer].state.master if link is not None and peer in guest else ""
    if veth.bridge is not None and master != veth.bridge:
        back = f"link set dev {peer} master {master}" if master else f"link set dev {peer} nomaster"
        do = f"link set dev {peer} master {veth.bridge}"
        steps.append(Step(do, back if link is not None else "", f"{field}.veth.bridge"))
    return Placing(where, tuple(steps))


def _device(wanted: Interface, target: Links, guest: Links, same: bool, field: str) -> Placing:
    name = wanted.name
    if wanted.mac is not None:
        mac = wanted.mac.lower()
        what, by = f"with the address {mac}", f"{field}.mac"
        here, there = _by_mac(target, mac), "" if same else _by_mac(guest, mac)
    elif wanted.device is not None:
        what, by = wanted.device, f"{field}.device"
        # A device that has the name in a container was moved there: its old name may be another's by now.
        moved = name in target and not target[name].state.kind
        there = wanted.device if not same and not moved and wanted.device in guest else ""
        here = "" if there else next((each for each in (wanted.device, name) if each in target), "")
    else:
        what, by, there = name, f"{field}.name", ""
        here = name if name in target else ""
    if not here and not there:
        raise NotYet(by, what, guest)
    if here != name and name in target:
        raise _taken(name, target[name], f"{field}.name")
    if here:
        return Placing("target", _rename(here, name, target[here].state.up, f"{field}.name"))
    do = f"link set dev {there} netns {OTHER} name {name}"
    return Placing("guest", (Step(do, "", by),))


def come_back(wanted: Interface, before: str) -> Step:
    """Takes an interface back that was moved: in its new namespace, OTHER being the guest's."""
    return Step(f"link set dev {wanted.name} netns {OTHER} name {before}", "", "")


def _rename(old: str, new: str, up: bool, field: str) -> tuple[Step, ...]:
    """Older kernels rename only what is down."""
    if old == new:
        return ()
    down = Step(f"link set dev {old} down", f"link set dev {old} up", field) if up else None
    change = Step(f"link set dev {old} name {new}", f"link set dev {new} name {old}", field)
    return (down, change) if down else (change,)


def _by_mac(links: Links, mac: str) -> str:
    """A device before what is made: bridges and the like take the addresses of their ports."""
    found = [name for name, link in links.items() if mac in link.macs and link.state.kind != "bridge"]
    devices = [name for name in found if not links[name].state.kind]
    return next(iter(devices or found), "")


def _must_be(kind: str, link: Link, field: str) -> None:
    if link.state.kind != kind:
        raise RpcError(
            Code.FAILED_PRECONDITION,
            f"{field}.name: {link.state.name} is there, and is {link.state.kind or 'a device'}, no {kind};"
            " choose another name",
            field=f"{field}.name",
        )


def _taken(name: str, link: Link, field: str) -> RpcError:
    which = f" ({link.state.mac})" if link.state.mac else ""
    return RpcError(
        Code.FAILED_PRECONDITION, f"{field}: {name} is the name of another interface{which}", field=field
    )
