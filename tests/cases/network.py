"""Networks of containers, each change in their own namespaces: the machine's stays as it is."""

from __future__ import annotations

import pytest
from tenacity import AsyncRetrying, retry_if_not_result, stop_after_delay, wait_exponential

from gcsagent.host import network
from gcsagent.host.client import Client
from protocol.errors import Code, RpcError
from protocol.families.network import (
    ApplyNetwork,
    Interface,
    Neighbour,
    NetworkState,
    Route,
    Veth,
)
from protocol.pods import Dns, HostsEntry
from tests.cases.target import Target, case, connect, raw_call, refused, run, running

MAC = "02:00:00:00:00:01"
CONNECT = (
    "import socket, sys; a = sys.argv[1]\n"
    "s = socket.socket(socket.AF_INET6 if ':' in a else socket.AF_INET); s.settimeout(20)\n"
    "print(s.connect_ex((a, 9)))"
)
REFUSED = b"111\n"
"""ECONNREFUSED: there was somebody to refuse it."""


async def reach(client: Client, container: str, address: str) -> bytes:
    """What connecting to a port where nobody listens comes to."""
    return (await run(client, container, "python3", "-c", CONNECT, address)).stdout


async def names_become(client: Client, *wanted: str) -> list[str]:
    """The guest's interfaces, once they are those: the kernel takes a namespace down after its last process
    has gone, and tells nobody when."""
    attempts = AsyncRetrying(
        retry=retry_if_not_result(lambda names: names == list(wanted)),
        stop=stop_after_delay(20.0),
        wait=wait_exponential(multiplier=0.01, max=0.5),
        retry_error_callback=lambda state: state.outcome.result() if state.outcome else None,
    )

    async def look() -> list[str]:
        return [each.name for each in (await network.state(client)).interfaces]

    names: list[str] = await attempts(look)
    return names


def routes_of(state: NetworkState) -> set[tuple[str, str, str]]:
    return {(each.to, each.via, each.interface) for each in state.routes if each.protocol == "71"}


@case
async def a_cable_between_two_containers_carries_both_families(target: Target) -> None:
    async with (
        await connect(target) as client,
        running(target, client) as one,
        running(target, client) as two,
    ):
        params = ApplyNetwork(
            one.container,
            interfaces=(
                Interface("lo"),
                Interface(
                    "net0",
                    mac=MAC,
                    veth=Veth("net1", container=two.container),
                    addresses=("10.1.0.1/24", "fd00::1/64"),
                    mtu=1400,
                ),
            ),
            routes=(Route("default", "192.0.2.1", "net0"), Route("10.9.0.0/16", "10.1.0.2")),
            neighbours=(Neighbour("192.0.2.1", "02:00:00:00:00:09", "net0"),),
            dns=Dns(("192.0.2.53",), ("example.org",), ("ndots:2",)),
            hosts=(HostsEntry("10.1.0.2", ("two",)),),
            sysctls={"net.ipv4.ip_forward": "1"},
        )
        done = await network.apply(client, params)
        assert [each.name for each in done.interfaces] == ["lo", "net0"]
        assert (await network.apply(client, params)).changes == ()
        other = Interface("net1", addresses=("10.1.0.2/24", "fd00::2/64"))
        await network.apply(client, ApplyNetwork(two.container, (other,)))
        assert await reach(client, one.container, "10.1.0.2") == REFUSED
        assert await reach(client, two.container, "fd00::1") == REFUSED

        state = await network.state(client, one.container)
        net0 = next(each for each in state.interfaces if each.name == "net0")
        assert (net0.mac, net0.mtu, net0.kind, net0.running) == (MAC, 1400, "veth", True)
        assert {"10.1.0.1/24", "fd00::1/64"} <= set(net0.addresses)
        assert routes_of(state) == {("default", "192.0.2.1", "net0"), ("10.9.0.0/16", "10.1.0.2", "net0")}
        assert [route.onlink for route in state.routes if route.to == "default"] == [True]
        assert (state.neighbours, state.dns) == (params.neighbours, params.dns)
        seen = await run(
            client, one.container, "cat", "/etc/resolv.conf", "/etc/hosts", "/proc/sys/net/ipv4/ip_forward"
        )
        assert seen.stdout.decode().splitlines()[:3] == [
            "nameserver 192.0.2.53",
            "search example.org",
            "options ndots:2",
        ]
        assert seen.stdout.endswith(b"10.1.0.2\ttwo\n1\n")

        await network.apply(
            client,
            ApplyNetwork(
                one.container, (Interface("net0", addresses=("10.1.0.1/24",)),), routes=(), neighbours=()
            ),
        )
        state = await network.state(client, one.container)
        assert (routes_of(state), state.neighbours) == (set(), ())
        assert "fd00::1/64" not in next(i.addresses for i in state.interfaces if i.name == "net0")
        await network.remove(client, "net0", one.container)
        left = await network.state(client, two.container)
        assert [each.name for each in left.interfaces] == ["lo"]


@case
async def a_network_that_cannot_be_is_taken_back_whole(target: Target) -> None:
    async with await connect(target) as client, running(target, client) as box:
        first = ApplyNetwork(
            box.container,
            (Interface("br0", mac=MAC, bridge=True, addresses=("10.1.0.1/24",), mtu=1400),),
            routes=(Route("10.9.0.0/16", "10.1.0.2"),),
        )
        await network.apply(client, first)
        before = await network.state(client, box.container)
        wrong = ApplyNetwork(
            box.container,
            (
                Interface("br0", addresses=("10.2.0.1/24",), mtu=1300),
                Interface("br1", bridge=True, addresses=("10.3.0.1/24",)),
            ),
            routes=(Route("10.8.0.0/16", "10.3.0.2"), Route("10.7.0.0/16", "10.3.0.2", source="10.99.0.1")),
            sysctls={"net.ipv4.ip_forward": "1"},
        )
        with pytest.raises(RpcError) as caught:
            await network.apply(client, wrong)
        error = caught.value
        assert (error.code, error.details["field"]) == (Code.FAILED_PRECONDITION, "routes[1]"), error
        assert error.details["step"].startswith("route replace 10.7.0.0/16")
        assert error.details["stderr"]
        assert "left" not in error.details, error.details
        assert _lasting(await network.state(client, box.container)) == _lasting(before)
        forward = await run(client, box.container, "cat", "/proc/sys/net/ipv4/ip_forward")
        assert forward.stdout == b"0\n"
        assert (await network.apply(client, first)).changes == ()


def _lasting(state: NetworkState) -> tuple[object, ...]:
    """Without link-local addresses and carriers, which come a moment later."""
    links = tuple(
        (each.name, each.mac, each.kind, each.mtu, each.up, {a for a in each.addresses if a[:4] != "fe80"})
        for each in state.interfaces
    )
    return links, routes_of(state), state.neighbours


@case
async def what_is_wrong_with_a_network_is_said_by_field(target: Target) -> None:
    async with await connect(target) as client, running(target, client) as box:
        where = box.container
        with refused(Code.NOT_FOUND):
            await network.state(client, "nobody")
        for code, field, more in (
            (Code.INVALID_ARGUMENT, "sysctls", {"sysctls": {"kernel.panic": "0"}}),
            (Code.NOT_FOUND, "sysctls.net.ipv4.nonsense", {"sysctls": {"net.ipv4.nonsense": "1"}}),
            (Code.INVALID_ARGUMENT, "interfaces[0].name", {"interfaces": [{"name": "lo; reboot"}]}),
            (
                Code.INVALID_ARGUMENT,
                "interfaces[0].addresses[0]",
                {"interfaces": [{"name": "lo", "addresses": ["10.0.0.1"]}]},
            ),
            (Code.NOT_FOUND, "interfaces[0].name", {"interfaces": [{"name": "eth7"}]}),
            (
                Code.NOT_FOUND,
                "interfaces[0].mac",
                {"interfaces": [{"name": "eth7", "mac": "02:00:00:00:00:77"}], "wait_ms": 100},
            ),
            (Code.INVALID_ARGUMENT, "routes[0].to", {"routes": [{"to": "10.0.0.1/8"}]}),
            (Code.INVALID_ARGUMENT, "routes[0].interface", {"routes": [{"to": "default"}]}),
            (Code.INVALID_ARGUMENT, "masquerade[0]", {"masquerade": ["10.0.0.0"]}),
        ):
            with refused(code, field=field):
                await raw_call(target, "network.apply", {"container": where, **more})
        state = await network.state(client, where)
        assert [(each.name, each.kind) for each in state.interfaces] == [("lo", "loopback")]
        await box.kill("KILL")
        await box.wait()
        with refused(Code.FAILED_PRECONDITION):
            await network.state(client, where)
