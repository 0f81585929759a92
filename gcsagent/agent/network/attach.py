"""network.attach: a container's interface on a bridge in the guest, with an address that is free there.

Which addresses are taken stands in the kernel, as the alias of the cables' ends in the guest: it goes with
the cable, and that goes with the container's namespace, so that nothing has to be given back.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterable

from gcsagent.agent.call import Call
from gcsagent.agent.network import kernel, namespaces, place
from gcsagent.agent.network.kernel import Link
from gcsagent.agent.network.plan import PROTOCOL, Step, network_of
from gcsagent.agent.network.service import LOOK_SECONDS, NetworkService
from gcsagent.agent.network.tools import Namespace
from protocol.errors import Code, RpcError
from protocol.families.network import (
    ApplyNetwork,
    Attached,
    AttachNetwork,
    Interface,
    Route,
    RouteState,
    Veth,
)

_MAX_TRIED = 65536
"""Addresses looked at for a free one: there are no more ports on a bridge (BR_PORT_BITS is 10)."""


class AttachService:
    def __init__(self, network: NetworkService) -> None:
        self._network = network

    async def attach(self, params: AttachNetwork, call: Call) -> Attached:
        gateways = gateways_of(params.subnets)
        network = self._network
        with (
            namespaces.guest() as guest,
            namespaces.of_container(network.registry, params.container) as target,
        ):
            async with network.changing(guest) as changes:
                target.check_lives()
                links = await kernel.links(network.tools, guest, LOOK_SECONDS)
                _check_bridge(links.get(params.bridge), params.bridge, gateways)
                masquerade = await self._masquerade(params, guest)
                bridge = Interface(params.bridge, mac=mac_of(gateways), bridge=True, addresses=gateways)
                shall = ApplyNetwork(interfaces=(bridge,), masquerade=masquerade)
                await network.carry_out(shall, guest, guest, changes, call)

                peer = place.peer_name(params.container, params.name)
                addresses = _had(links.get(peer), params) or choose(params.subnets, taken(links.values()))
                routes = await kernel.routes(network.tools, target, LOOK_SECONDS)
                shall = _container_side(params, peer, addresses, gateways, routes)
                alias = _alias(params, addresses)
                if peer not in links or links[peer].state.alias != alias:
                    # Before the container has the address: an agent killed in between must not leave one
                    # that is taken and does not look it.
                    await network.put_in_place(shall, target, guest, changes, call)
                    step = Step(f"link set dev {peer} alias {alias}", "", "name")
                    await changes.ip(guest, [step], call.timeout)
                found = await network.carry_out(shall, target, guest, changes, call)
                call.commit()
        return Attached(found[params.name].state, peer, tuple(each.split("/")[0] for each in gateways))

    async def _masquerade(self, params: AttachNetwork, guest: Namespace) -> tuple[str, ...] | None:
        if not params.masquerade:
            return None
        before = await self._network.masqueraded(guest, sure=True)
        return tuple(dict.fromkeys((*before, *params.subnets)))


def gateways_of(subnets: tuple[str, ...]) -> tuple[str, ...]:
    """The bridge's own addresses: the first of each network."""
    found: dict[int, str] = {}
    for index, text in enumerate(subnets):
        network = ipaddress.ip_network(text)
        field = f"subnets[{index}]"
        if network.num_addresses < 4:
            raise RpcError(Code.INVALID_ARGUMENT, f"{field}: has no room for containers", field=field)
        if network.version in found:
            raise RpcError(
                Code.INVALID_ARGUMENT, f"{field}: a second network of its family; give one", field=field
            )
        found[network.version] = f"{network[1]}/{network.prefixlen}"
    if not found:
        raise RpcError(Code.INVALID_ARGUMENT, "subnets: give at least one network", field="subnets")
    return tuple(found.values())


def taken(links: Iterable[Link]) -> set[str]:
    """Addresses that containers have, by the aliases of their cables."""
    return {
        address.split("/")[0]
        for link in links
        if link.state.alias.startswith("gcs:")
        for address in link.state.alias.split(",")[1:]
    }


def choose(subnets: tuple[str, ...], used: set[str]) -> tuple[str, ...]:
    """The lowest free address of each network. Raises RESOURCE_EXHAUSTED."""
    chosen = []
    for index, text in enumerate(subnets):
        network = ipaddress.ip_network(text)
        last = min(network.num_addresses - (2 if network.version == 4 else 1), _MAX_TRIED)
        free = (network[number] for number in range(2, last + 1) if str(network[number]) not in used)
        address = next(free, None)
        if address is None:
            raise RpcError(
                Code.RESOURCE_EXHAUSTED,
                f"subnets[{index}]: every address of {text} is taken; delete containers, or give a larger"
                " network and another bridge",
                field=f"subnets[{index}]",
            )
        chosen.append(f"{address}/{network.prefixlen}")
    return tuple(chosen)


def mac_of(addresses: tuple[str, ...]) -> str:
    """The same for the same addresses, so that nobody remembers another for them; locally administered."""
    digest = hashlib.sha256(",".join(addresses).encode()).digest()
    return ":".join(f"{byte:02x}" for byte in (0x02, *digest[:5]))


def _alias(params: AttachNetwork, addresses: tuple[str, ...]) -> str:
    return ",".join((f"gcs:{params.container}/{params.name}", *addresses))


def _had(link: Link | None, params: AttachNetwork) -> tuple[str, ...]:
    """The addresses an earlier request has given it, if they are still of the networks asked for."""
    if link is None:
        return ()
    owner, *addresses = link.state.alias.split(",")
    same = [network_of(each) for each in addresses] == list(params.subnets)
    return tuple(addresses) if owner == f"gcs:{params.container}/{params.name}" and same else ()


def _check_bridge(link: Link | None, name: str, gateways: tuple[str, ...]) -> None:
    """Another's addresses would be taken away from under the containers that are there."""
    if link is None or not link.own or set(gateways) >= set(link.own):
        return
    raise RpcError(
        Code.FAILED_PRECONDITION,
        f"bridge: {name} has other networks already ({', '.join(link.own)}); give those, or another bridge",
        field="bridge",
    )


def _container_side(
    params: AttachNetwork,
    peer: str,
    addresses: tuple[str, ...],
    gateways: tuple[str, ...],
    routes: tuple[RouteState, ...],
) -> ApplyNetwork:
    """Its cable, and default routes where it has none; routes it was given before stay."""
    cable = Veth(peer, bridge=params.bridge)
    interface = Interface(params.name, mac=mac_of(addresses), veth=cable, addresses=addresses)
    kept = [
        Route(
            each.to if each.to != "default" or each.via else ("0.0.0.0/0" if each.family == 4 else "::/0"),
            each.via or None,
            each.interface,
            each.source or None,
            each.metric,
        )
        for each in routes
        if each.protocol == PROTOCOL
    ]
    has = {each.family for each in routes if each.to == "default"}
    for gateway in gateways:
        address = gateway.split("/")[0]
        if (6 if ":" in address else 4) not in has:
            kept.append(Route("default", address, params.name))
    return ApplyNetwork(params.container, (Interface("lo"), interface), routes=tuple(kept))
