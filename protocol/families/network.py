"""``network.*``: what the guest's network namespace, or a container's, looks like."""

from __future__ import annotations

from typing import Annotated

from protocol import checks, netchecks
from protocol.dataclass import dataclass, field
from protocol.method import LONG, QUICK, RUNTIME, Empty, Method
from protocol.pods import Dns, HostsEntry

MTU = checks.Between(68, 65536)
METRIC = checks.Between(0, 0xFFFFFFFF)
MAX_WAIT_MS = 600_000


@dataclass(frozen=True, slots=True)
class Veth:
    """One end of a cable; where the other end is."""

    peer: netchecks.Ifname | None = None
    """The other end's name; absent: one made from the container's id and this end's name."""
    container: checks.Id | None = None
    """The container the other end is in; absent: the guest."""
    bridge: netchecks.Ifname | None = None
    """A bridge in the guest that the other end is plugged into; it is not made."""


@dataclass(frozen=True, slots=True)
class Interface:
    """An interface as it shall be. It is there already under its name, or found by ``mac`` or ``device``
    (in the guest, and moved here), or made (``veth``, ``bridge``)."""

    name: netchecks.Ifname
    """What it is called, or shall be."""
    mac: netchecks.Mac | None = None
    """With ``veth`` and ``bridge`` the address it shall have, else the one it is found by."""
    device: netchecks.Ifname | None = None
    """Found by its name in the guest."""
    veth: Veth | None = None
    """Make it: one end of a veth pair."""
    bridge: bool = False
    """Make it: a bridge."""
    master: netchecks.Ifname | None = None
    """The bridge, in the same namespace, that it shall be a port of."""
    addresses: Annotated[tuple[netchecks.InterfaceAddress, ...], checks.AtMost(256)] | None = None
    """All it shall have; absent: they stay. Those the kernel gives itself (link-local, from router
    advertisements) are left alone."""
    mtu: Annotated[int, MTU] | None = None
    """Bytes; absent: it stays."""
    up: bool = True
    """Whether it shall be up."""


@dataclass(frozen=True, slots=True)
class Route:
    to: netchecks.Destination
    """A network, or `default`: all of IPv4, or of IPv6 when ``via`` is."""
    via: checks.IpAddress | None = None
    """The gateway. One in no subnet of ``interface`` is taken to be on its link."""
    interface: netchecks.Ifname | None = None
    """Absent: the one whose subnet ``via`` is in."""
    source: checks.IpAddress | None = None
    """The address that packets are sent from, when their sender has not chosen."""
    metric: Annotated[int, METRIC] | None = None
    """Absent: the kernel's default. Of routes to the same network, the lowest is used."""


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A permanent entry: nobody has to be asked for this address."""

    address: checks.IpAddress
    """On the interface's link."""
    mac: netchecks.Mac
    """Where frames for it go."""
    interface: netchecks.Ifname
    """Whose link it is."""


@dataclass(frozen=True, slots=True)
class ApplyNetwork:
    """A network namespace as it shall be. A list that is given is all there shall be; what is absent stays.

    Interfaces that are not named stay as they are; of routes only those made by this method are removed.
    """

    container: checks.Id | None = None
    """The container whose network namespace it is; absent: the guest's own."""
    interfaces: Annotated[tuple[Interface, ...], checks.AtMost(64)] = ()
    """Found, moved, made and configured, in this order."""
    routes: Annotated[tuple[Route, ...], checks.AtMost(1024)] | None = None
    """All that this method has made or makes."""
    neighbours: Annotated[tuple[Neighbour, ...], checks.AtMost(1024)] | None = None
    """All permanent entries there shall be."""
    dns: Dns | None = None
    """/etc/resolv.conf of the guest, the container, or with a sandbox the pod."""
    hosts: Annotated[tuple[HostsEntry, ...], checks.AtMost(1024)] | None = None
    """/etc/hosts of the same, below the lines for localhost."""
    sysctls: netchecks.Sysctls = field(default_factory=dict)
    """Kernel settings below ``net.``, set before addresses and routes."""
    masquerade: Annotated[tuple[netchecks.Subnet, ...], checks.AtMost(64)] | None = None
    """Networks whose packets to elsewhere leave with the sender's address replaced; turns forwarding on."""
    wait_ms: Annotated[int, checks.Between(0, MAX_WAIT_MS)] = 0
    """How long an interface that is not there yet is waited for."""


@dataclass(frozen=True, slots=True)
class InterfaceState:
    name: str = ""
    """Its name."""
    mac: str = ""
    """Its address; empty: it has none."""
    kind: str = ""
    """`veth`, `bridge`, `loopback`, ...; empty: a device."""
    index: int = 0
    """The kernel's number for it in its namespace."""
    mtu: int = 0
    """Bytes."""
    up: bool = False
    """Whether it has been set up."""
    running: bool = False
    """Whether it has a carrier, too."""
    master: str = ""
    """The bridge it is a port of."""
    alias: str = ""
    """A text kept with it; with that of a cable's end in the guest says whose other end is."""
    addresses: tuple[str, ...] = ()
    """With their prefix lengths."""


@dataclass(frozen=True, slots=True)
class RouteState:
    to: str = ""
    """A network, or `default`."""
    family: int = 4
    """4 or 6."""
    via: str = ""
    """The gateway; empty: it is on the link."""
    interface: str = ""
    """Where it leads out."""
    source: str = ""
    """The address packets are sent from, if it is said."""
    metric: int = 0
    """Of routes to the same network, the lowest is used."""
    protocol: str = ""
    """Who made it: `kernel`, `boot`, `static`, ...; `71`: network.apply."""
    onlink: bool = False
    """The gateway is taken to be on the link, whatever the subnets say."""


@dataclass(frozen=True, slots=True)
class NetworkState:
    interfaces: tuple[InterfaceState, ...] = ()
    """By number."""
    routes: tuple[RouteState, ...] = ()
    """Of the main table."""
    neighbours: tuple[Neighbour, ...] = ()
    """The permanent ones."""
    dns: Dns = Dns()
    """What /etc/resolv.conf says."""
    masquerade: tuple[str, ...] = ()
    """Networks whose packets are masqueraded, by this agent's rules."""


@dataclass(frozen=True, slots=True)
class Applied:
    changes: tuple[str, ...] = ()
    """What was done, a step each, in the words of the tools; none: it was so already."""
    interfaces: tuple[InterfaceState, ...] = ()
    """Those named in the request, as they are now."""


@dataclass(frozen=True, slots=True)
class NetworkRef:
    container: checks.Id | None = None
    """The container whose network namespace it is; absent: the guest's own."""


@dataclass(frozen=True, slots=True)
class AttachNetwork:
    """Gives a container an interface on a bridge in the guest, with an address that is free there."""

    container: checks.Id
    name: netchecks.Ifname = "eth0"
    """What the interface is called in the container."""
    bridge: netchecks.Ifname = "gcs0"
    """The bridge in the guest; made if it is not there."""
    subnets: tuple[netchecks.Subnet, ...] = ("10.88.0.0/16",)
    """The bridge's networks, one a family at most; the first address of each is the bridge's own."""
    masquerade: bool = True
    """Let containers reach what the guest reaches, under the guest's addresses."""


@dataclass(frozen=True, slots=True)
class Attached:
    interface: InterfaceState = InterfaceState()
    """The container's."""
    peer: str = ""
    """The other end's name in the guest."""
    gateways: tuple[str, ...] = ()
    """The bridge's addresses, which the container's default routes lead to."""


@dataclass(frozen=True, slots=True)
class RemoveInterface:
    """A made interface is removed, with its other end; a device goes back to the guest, down."""

    interface: netchecks.Ifname
    """Its name."""
    container: checks.Id | None = None
    """The container whose network namespace it is in; absent: the guest's own."""


METHODS = (
    Method("network.apply", ApplyNetwork, Applied, LONG, True, "the last step has been done"),
    Method("network.attach", AttachNetwork, Attached, RUNTIME, True, "the last step has been done"),
    Method("network.state", NetworkRef, NetworkState, QUICK),
    Method("network.remove", RemoveInterface, Empty, RUNTIME, True, "it has been removed"),
)
