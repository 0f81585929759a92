"""From what a namespace has to what it shall have: the steps, what takes them back, and what is refused."""

from __future__ import annotations

import pytest

from gcsagent.agent.network import place, plan
from gcsagent.agent.network.kernel import Link, Snapshot
from protocol.errors import Code, RpcError
from protocol.families.network import (
    ApplyNetwork,
    Interface,
    InterfaceState,
    Neighbour,
    Route,
    RouteState,
    Veth,
)


def link(
    name: str, *addresses: str, kind: str = "", mac: str = "", index: int = 2, master: str = "", peer: int = 0
) -> Link:
    state = InterfaceState(name, mac, kind, index, 1500, True, True, master, "", addresses)
    return Link(state, addresses, (mac,) if mac else (), peer)


def snapshot(
    *links: Link, routes: tuple[RouteState, ...] = (), neighbours: tuple[Neighbour, ...] = ()
) -> Snapshot:
    return Snapshot({each.state.name: each for each in links}, routes, neighbours)


ETH0 = link("eth0", "10.0.0.2/24", mac="02:00:00:00:00:01")
OWN = RouteState("10.9.0.0/16", 4, "10.0.0.1", "eth0", protocol="71")


def lines(wanted: ApplyNetwork, now: Snapshot) -> list[tuple[str, str]]:
    return [(step.do, step.undo) for step in plan.steps(wanted, now)]


def test_what_is_so_already_takes_no_step() -> None:
    wanted = ApplyNetwork(
        interfaces=(Interface("eth0", addresses=("10.0.0.2/24",), mtu=1500),),
        routes=(Route("10.9.0.0/16", "10.0.0.1"),),
        neighbours=(Neighbour("10.0.0.9", "02:00:00:00:00:09", "eth0"),),
    )
    now = snapshot(ETH0, routes=(OWN,), neighbours=wanted.neighbours or ())
    assert plan.steps(wanted, now) == []


def test_what_is_absent_stays() -> None:
    now = snapshot(ETH0, routes=(OWN,), neighbours=(Neighbour("10.0.0.9", "02:00:00:00:00:09", "eth0"),))
    assert plan.steps(ApplyNetwork(interfaces=(Interface("eth0"),)), now) == []


def test_addresses_come_before_others_go_and_spellings_are_one() -> None:
    wanted = ApplyNetwork(interfaces=(Interface("eth0", addresses=("FD00:0::2/64", "10.0.0.3/24")),))
    assert lines(wanted, snapshot(ETH0)) == [
        ("address add fd00::2/64 nodad dev eth0", "address del fd00::2/64 dev eth0"),
        ("address add 10.0.0.3/24 broadcast + dev eth0", "address del 10.0.0.3/24 dev eth0"),
        ("address del 10.0.0.2/24 dev eth0", "address add 10.0.0.2/24 broadcast + dev eth0"),
    ]
    assert plan.settings(wanted, snapshot(ETH0)) == {"net/ipv4/conf/eth0/promote_secondaries": "1"}
    same = ApplyNetwork(interfaces=(Interface("eth0", addresses=("FD00:0::2/64",)),))
    assert lines(same, snapshot(link("eth0", "fd00::2/64"))) == []
    assert plan.settings(same, snapshot(link("eth0", "fd00::2/64"))) == {}


@pytest.mark.parametrize("source", ["", "10.0.0.2"])
def test_a_route_that_would_go_with_an_address_goes_before_it(source: str) -> None:
    route = RouteState("10.9.0.0/16", 4, "10.0.0.1", "eth0", source=source, protocol="static")
    gone = ApplyNetwork(interfaces=(Interface("eth0", addresses=()),))
    words = f"10.9.0.0/16 via 10.0.0.1 dev eth0{' src 10.0.0.2' if source else ''} protocol static"
    assert lines(gone, snapshot(ETH0, routes=(route,))) == [
        (f"route del {words}", f"route replace {words}"),
        ("address del 10.0.0.2/24 dev eth0", "address add 10.0.0.2/24 broadcast + dev eth0"),
    ]
    other = ApplyNetwork(interfaces=(Interface("eth0", addresses=("10.0.0.3/24",)),))
    firsts = [do for do, _ in lines(other, snapshot(ETH0, routes=(route,)))]
    assert any(do.startswith("route del") for do in firsts) is bool(source)


def test_addresses_of_the_kernel_s_own_stay() -> None:
    now = snapshot(Link(InterfaceState("eth0", up=True, addresses=("fe80::1/64",)), own=()))
    assert plan.steps(ApplyNetwork(interfaces=(Interface("eth0", addresses=()),)), now) == []


def test_a_gateway_beyond_every_subnet_is_taken_to_be_on_the_link() -> None:
    wanted = ApplyNetwork(routes=(Route("default", "192.0.2.1", "eth0"),))
    assert lines(wanted, snapshot(ETH0)) == [
        (
            "route replace 0.0.0.0/0 via 192.0.2.1 dev eth0 protocol 71 onlink",
            "route del 0.0.0.0/0 via 192.0.2.1 dev eth0 protocol 71",
        )
    ]


def test_a_route_follows_addresses_that_are_only_being_given() -> None:
    wanted = ApplyNetwork(
        interfaces=(Interface("eth0", addresses=("10.7.0.2/24",)),), routes=(Route("default", "10.7.0.1"),)
    )
    assert lines(wanted, snapshot(ETH0))[-1][0] == "route replace 0.0.0.0/0 via 10.7.0.1 dev eth0 protocol 71"


def test_a_link_local_gateway_is_on_every_link() -> None:
    wanted = ApplyNetwork(routes=(Route("default", "fe80::1", "eth0"),))
    assert lines(wanted, snapshot(ETH0))[0][0] == (
        "route replace ::/0 via fe80::1 dev eth0 metric 1024 protocol 71"
    )


def test_only_routes_of_our_own_go() -> None:
    other = RouteState("10.8.0.0/16", 4, "10.0.0.1", "eth0", protocol="static")
    assert lines(ApplyNetwork(routes=()), snapshot(ETH0, routes=(OWN, other))) == [
        (
            "route del 10.9.0.0/16 via 10.0.0.1 dev eth0 protocol 71",
            "route replace 10.9.0.0/16 via 10.0.0.1 dev eth0 protocol 71",
        )
    ]


def test_routes_are_made_again_when_their_interface_goes_down() -> None:
    wanted = ApplyNetwork(
        interfaces=(Interface("eth0", up=False),), routes=(Route("10.9.0.0/16", "10.0.0.1", "eth0"),)
    )
    assert lines(wanted, snapshot(ETH0, routes=(OWN,)))[-1][0].startswith("route replace 10.9.0.0/16")


def test_a_route_that_changes_can_be_put_back() -> None:
    wanted = ApplyNetwork(routes=(Route("10.9.0.0/16", "10.0.0.7"),))
    [(do, undo)] = lines(wanted, snapshot(ETH0, routes=(OWN,)))
    assert do == "route replace 10.9.0.0/16 via 10.0.0.7 dev eth0 protocol 71"
    assert undo == "route replace 10.9.0.0/16 via 10.0.0.1 dev eth0 protocol 71"


def test_a_neighbour_whose_address_is_another_s_now_is_replaced_and_others_go() -> None:
    had = (
        Neighbour("10.0.0.9", "02:00:00:00:00:09", "eth0"),
        Neighbour("10.0.0.8", "02:00:00:00:00:08", "eth0"),
    )
    wanted = ApplyNetwork(neighbours=(Neighbour("10.0.0.9", "02:00:00:00:00:0a", "eth0"),))
    assert [do for do, _ in lines(wanted, snapshot(ETH0, neighbours=had))] == [
        "neigh replace 10.0.0.9 dev eth0 lladdr 02:00:00:00:00:0a nud permanent",
        "neigh del 10.0.0.8 dev eth0",
    ]


@pytest.mark.parametrize(
    "wanted, code, field",
    [
        (ApplyNetwork(interfaces=(Interface("eth9"),)), Code.NOT_FOUND, "interfaces[0].name"),
        (ApplyNetwork(interfaces=(Interface("eth0", master="br9"),)), Code.NOT_FOUND, "interfaces[0].master"),
        (ApplyNetwork(routes=(Route("default", "192.0.2.1"),)), Code.INVALID_ARGUMENT, "routes[0].interface"),
        (ApplyNetwork(routes=(Route("default", interface="eth9"),)), Code.NOT_FOUND, "routes[0].interface"),
        (
            ApplyNetwork(neighbours=(Neighbour("10.0.0.9", "02:00:00:00:00:0a", "eth9"),)),
            Code.NOT_FOUND,
            "neighbours[0].interface",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_field(wanted: ApplyNetwork, code: Code, field: str) -> None:
    with pytest.raises(RpcError) as caught:
        plan.steps(wanted, snapshot(ETH0))
    assert (caught.value.code, caught.value.details["field"]) == (code, field)


# -- placing --------------------------------------------------------------------------------------

LO = link("lo", kind="loopback", index=1)
BRIDGE = link("gcs0", kind="bridge", mac="02:00:00:00:00:01", index=3)


def where(wanted: Interface, target: tuple[Link, ...], guest: tuple[Link, ...]) -> tuple[str, list[str]]:
    here, there = ({each.state.name: each for each in links} for links in (target, guest))
    found = place.placing(wanted, here, there, target is guest, "web", "interfaces[0]")
    return found.where, [step.do for step in found.steps]


def test_a_device_is_found_by_address_before_a_bridge_that_has_taken_it() -> None:
    wanted = Interface("net0", mac="02:00:00:00:00:01")
    assert where(wanted, (LO,), (LO, BRIDGE, ETH0)) == (
        "guest",
        ["link set dev eth0 netns /proc/self/fd/4 name net0"],
    )


def test_a_device_in_its_place_is_left_there() -> None:
    assert where(Interface("eth0", mac="02:00:00:00:00:01"), (LO, ETH0), (LO,)) == ("target", [])
    assert where(Interface("eth0", device="eth3"), (LO, ETH0), (LO, link("eth3"))) == ("target", [])


def test_a_device_is_renamed_while_it_is_down() -> None:
    links = (LO, ETH0)
    assert where(Interface("net0", mac="02:00:00:00:00:01"), links, links) == (
        "target",
        ["link set dev eth0 down", "link set dev eth0 name net0"],
    )


def test_a_cable_is_made_with_its_end_in_its_place() -> None:
    wanted = Interface("eth0", mac="02:00:00:00:00:05", veth=Veth(bridge="gcs0"))
    peer = place.peer_name("web", "eth0")
    assert len(peer) == 15
    assert where(wanted, (LO,), (LO, BRIDGE)) == (
        "guest",
        [
            f"link add name {peer} type veth peer name eth0 netns /proc/self/fd/4 address 02:00:00:00:00:05",
            f"link set dev {peer} up",
            f"link set dev {peer} master gcs0",
        ],
    )


def test_a_cable_that_was_made_is_only_plugged_in() -> None:
    end = link("eth0", kind="veth", peer=7)
    other = link("web0", kind="veth", index=7)
    wanted = Interface("eth0", veth=Veth("web0", bridge="gcs0"))
    assert where(wanted, (LO, end), (LO, other)) == ("guest", ["link set dev web0 master gcs0"])
    plugged = link("web0", kind="veth", index=7, master="gcs0")
    assert where(wanted, (LO, end), (LO, plugged)) == ("guest", [])


@pytest.mark.parametrize(
    "wanted, field",
    [
        (Interface("lo", bridge=True), "interfaces[0].name"),
        (Interface("eth0", veth=Veth("gcs0")), "interfaces[0].veth.peer"),
        (Interface("web0", veth=Veth("gcs0")), "interfaces[0].veth"),
        (Interface("lo", device="eth5"), "interfaces[0].name"),
        (Interface("eth0", veth=Veth(container="b", bridge="gcs0")), "interfaces[0].veth.bridge"),
        (Interface("eth0", veth=Veth(), bridge=True), "interfaces[0]"),
        (Interface("eth0", mac="02:00:00:00:00:01", device="eth1"), "interfaces[0]"),
    ],
)
def test_what_is_in_the_way_is_named(wanted: Interface, field: str) -> None:
    web0 = link("web0", kind="veth", peer=99)
    with pytest.raises(RpcError) as caught:
        where(wanted, (LO, web0), (LO, BRIDGE, link("eth5")))
    assert caught.value.details["field"] == field


def test_what_is_not_there_yet_says_what_is() -> None:
    with pytest.raises(place.NotYet) as caught:
        where(Interface("eth0", mac="02:00:00:00:00:77"), (LO,), (LO, ETH0))
    assert caught.value.error.code is Code.NOT_FOUND
    assert "eth0 02:00:00:00:00:01" in caught.value.error.message
