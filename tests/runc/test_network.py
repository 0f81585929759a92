"""What network.* does to the agent's own namespace, which here is one that nobody else is in."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from gcsagent.host import network
from gcsagent.host.client import Client
from protocol.errors import Code, RpcError
from protocol.families.network import ApplyNetwork, AttachNetwork, Interface, Route, Veth
from protocol.pods import Dns, HostsEntry, PodMember, Sandbox
from tests.cases.agents import RunningAgent, eventually, stopped_clean
from tests.cases.network import REFUSED, names_become, reach
from tests.cases.target import Target, connect, run, running
from tests.fakes.toolbox import Toolbox
from tests.runc.test_fault_points import FAULTS, Act, Bench, walk

ALONE = ("unshare", "--net", "--")
MAC = "02:00:00:00:00:51"
KILLS = 12
SUBNETS = ("10.88.0.0/16", "fd00:88::/64")


@pytest.fixture(scope="module")
def alone() -> Iterator[RunningAgent]:
    """An agent in a network namespace of its own."""
    yield from stopped_clean(RunningAgent("--own-network", wrapper=ALONE))


@pytest.fixture
def target(alone: RunningAgent, rootfs: str) -> Target:
    assert os.readlink(f"/proc/{alone.agent_pid}/ns/net") != os.readlink("/proc/self/ns/net")
    return Target(alone.address, rootfs, box="", pace=1.0, execs=1)


async def _names(client: Client) -> list[str]:
    return [each.name for each in (await network.state(client)).interfaces]


def test_containers_on_a_bridge_reach_each_other_and_leave_nothing(
    alone: RunningAgent, target: Target
) -> None:
    async def work() -> None:
        async with await connect(target) as client:
            async with running(target, client) as one, running(target, client) as two:
                attach = AttachNetwork(one.container, subnets=SUBNETS, masquerade=False)
                first = await network.attach(client, attach)
                assert first.interface.addresses[:2] == ("10.88.0.2/16", "fd00:88::2/64")
                assert first.gateways == ("10.88.0.1", "fd00:88::1")
                assert (await network.attach(client, attach)).interface.index == first.interface.index
                second = await network.attach(
                    client, AttachNetwork(two.container, subnets=SUBNETS, masquerade=False)
                )
                assert second.interface.addresses[:2] == ("10.88.0.3/16", "fd00:88::3/64")
                for address in ("10.88.0.3", "fd00:88::3", "10.88.0.1"):
                    assert await reach(client, one.container, address) == REFUSED
                inside = await network.state(client, one.container)
                defaults = {route.via for route in inside.routes if route.to == "default"}
                assert defaults == {"10.88.0.1", "fd00:88::1"}
                with pytest.raises(RpcError) as caught:
                    await network.attach(client, AttachNetwork(two.container, "eth1", masquerade=False))
                assert (caught.value.code, caught.value.details["field"]) == (
                    Code.FAILED_PRECONDITION,
                    "bridge",
                )
            assert await names_become(client, "lo", "gcs0") == ["lo", "gcs0"]
            async with running(target, client) as three:
                again = await network.attach(
                    client, AttachNetwork(three.container, subnets=SUBNETS, masquerade=False)
                )
                assert again.interface.addresses[:2] == ("10.88.0.2/16", "fd00:88::2/64")
            await network.remove(client, "gcs0")
            assert await names_become(client, "lo") == ["lo"]

    before = alone.holdings()
    asyncio.run(work())
    alone.assert_holds(before)


def _plug(alone: RunningAgent, *words: str) -> None:
    """``ip link`` beside the agent, as hot-plugging comes to it."""
    subprocess.run(
        ["nsenter", "-t", str(alone.agent_pid), "-n", "ip", "link", *words], check=True, timeout=10
    )


def test_an_interface_is_waited_for_and_taken_when_it_comes(alone: RunningAgent, target: Target) -> None:
    async def work() -> None:
        async with await connect(target) as client, running(target, client) as box:
            wanted = Interface("net0", mac=MAC, addresses=("10.7.0.2/24",))
            params = ApplyNetwork(
                box.container, (Interface("br0", bridge=True), wanted), wait_ms=20_000, routes=()
            )
            applying = asyncio.create_task(network.apply(client, params))
            await client.ping()
            _plug(alone, "add", "other0", "type", "veth", "peer", "name", "other1")
            state = await network.state(client, box.container)
            assert [each.name for each in state.interfaces] == ["lo"]
            _plug(alone, "add", "plug0", "address", MAC, "type", "veth", "peer", "name", "plug1")
            done = await asyncio.wait_for(applying, 10)
            net0 = next(each for each in done.interfaces if each.name == "net0")
            assert (net0.mac, net0.addresses, net0.up) == (MAC, ("10.7.0.2/24",), True)
            assert (await network.apply(client, params)).changes == ()
            assert await _names(client) == ["lo", "other1", "other0", "plug1"]
        async with await connect(target) as client:
            _plug(alone, "del", "other0")
            assert await _names(client) == ["lo"]

    before = alone.holdings()
    asyncio.run(work())
    alone.assert_holds(before)


def test_what_a_request_made_before_it_failed_is_gone_again(alone: RunningAgent, target: Target) -> None:
    async def work() -> None:
        async with await connect(target) as client, running(target, client) as box:
            _plug(alone, "add", "plug0", "address", MAC, "type", "veth", "peer", "name", "plug1")
            wrong = ApplyNetwork(
                box.container,
                (
                    Interface("net0", device="plug0", addresses=("10.7.0.2/24",)),
                    Interface("net1", veth=Veth("cable0")),
                ),
                routes=(Route("10.8.0.0/16", "10.7.0.1", source="10.99.0.1"),),
            )
            with pytest.raises(RpcError) as caught:
                await network.apply(client, wrong)
            assert caught.value.details["field"] == "routes[0]"
            assert "left" not in caught.value.details, caught.value.details
            assert sorted(await _names(client)) == ["lo", "plug0", "plug1"]
            inside = await network.state(client, box.container)
            assert [each.name for each in inside.interfaces] == ["lo"]
            _plug(alone, "del", "plug0")

    before = alone.holdings()
    asyncio.run(work())
    alone.assert_holds(before)


def test_an_agent_killed_at_any_step_is_gone_on_from(rootfs: str) -> None:
    """SIGKILL after growing delays; the client sends the request again, and what it says is so."""
    agent = RunningAgent("--own-network", wrapper=ALONE)
    target = Target(agent.address, rootfs, box="", pace=1.0, execs=1)

    async def work() -> None:
        killed = 0
        async with await connect(target) as client, running(target, client) as box:
            for number in range(KILLS):
                attach = AttachNetwork(box.container, f"net{number}", subnets=SUBNETS, masquerade=False)
                attaching = asyncio.create_task(network.attach(client, attach))
                await asyncio.wait([attaching], timeout=0.012 * number)
                killed += not attaching.done()
                os.kill(agent.agent_pid, signal.SIGKILL)
                found = await asyncio.wait_for(attaching, 30)
                assert found.interface.addresses[:2] == (
                    f"10.88.0.{number + 2}/16",
                    f"fd00:88::{number + 2:x}/64",
                )
                again = await network.attach(client, attach)
                assert again.interface.index == found.interface.index
            state = await network.state(client, box.container)
            assert len(state.interfaces) == 1 + KILLS
        assert killed > 0, "no kill came while a request was under way"
        async with await connect(target) as client:
            await network.remove(client, "gcs0")
            assert await names_become(client, "lo") == ["lo"]

    try:
        asyncio.run(asyncio.wait_for(work(), 120))
    finally:
        agent.stop()


@pytest.fixture(scope="module")
def faulty(rootfs: str) -> Iterator[RunningAgent]:
    agent = RunningAgent("--own-network", wrapper=ALONE, python_path=str(FAULTS))
    yield from stopped_clean(agent)


async def _configure(bench: Bench, arm: Act) -> None:
    """On a bridge, and changed: addresses, routes, files, sysctls; killed at one step of either request."""
    async with running(bench.target, bench.client) as box:
        attach = AttachNetwork(box.container, subnets=SUBNETS, masquerade=False)
        params = ApplyNetwork(
            box.container,
            (Interface("eth0", addresses=("10.88.7.7/16",), mtu=1400), Interface("br9", bridge=True)),
            routes=(Route("default", "10.88.0.1"), Route("10.9.0.0/16", "192.0.2.1", "eth0")),
            dns=Dns(("192.0.2.53",)),
            sysctls={"net.ipv4.ip_forward": "1"},
        )
        await arm()
        await network.attach(bench.client, attach)
        await network.apply(bench.client, params)
        assert (await network.apply(bench.client, params)).changes == ()
        state = await network.state(bench.client, box.container)
        assert [each.name for each in state.interfaces] == ["lo", "eth0", "br9"]
        assert {(route.to, route.via) for route in state.routes if route.protocol == "71"} == {
            ("default", "10.88.0.1"),
            ("10.9.0.0/16", "192.0.2.1"),
        }
        assert state.dns == params.dns
    await network.remove(bench.client, "gcs0")
    assert await names_become(bench.client, "lo") == ["lo"]


def test_a_kill_at_any_step_that_is_told_or_written_is_gone_on_from(
    faulty: RunningAgent, rootfs: str
) -> None:
    walk(faulty, rootfs, _configure, stride=5)


def test_a_pod_s_files_follow_its_sandbox(alone: RunningAgent, target: Target) -> None:
    async def work() -> None:
        async with (
            await connect(target) as client,
            running(target, client, sandbox=Sandbox(dns=Dns(("192.0.2.1",)))) as pod,
            running(target, client, pod=PodMember(pod.container)) as member,
        ):
            params = ApplyNetwork(
                pod.container, dns=Dns(("192.0.2.53",)), hosts=(HostsEntry("192.0.2.9", ("db",)),)
            )
            assert len((await network.apply(client, params)).changes) == 2
            seen = await run(client, member.container, "cat", "/etc/resolv.conf", "/etc/hosts")
            assert seen.stdout.startswith(b"nameserver 192.0.2.53\n127.0.0.1\t")
            assert seen.stdout.endswith(b"192.0.2.9\tdb\n")
            assert (await network.apply(client, params)).changes == ()

    asyncio.run(work())


@pytest.fixture(scope="module")
def toolbox(tmp_path_factory: pytest.TempPathFactory) -> Toolbox:
    return Toolbox(tmp_path_factory.mktemp("tools"))


@pytest.fixture(scope="module")
def equipped(toolbox: Toolbox) -> Iterator[RunningAgent]:
    agent = RunningAgent("--own-network", wrapper=ALONE, path=str(toolbox.directory))
    yield from stopped_clean(agent)


def held_once(directory: Path, match: str, then: str) -> tuple[Path, Path, str]:
    """A script for ``ip`` that is held the first time it is told what ``match`` fits: until the second of the
    files is written to, when the first is there; then it does ``then``."""
    begun, fifo = directory / "begun", directory / "go"
    os.mkfifo(fifo)
    hold = f"[ -e {begun} ] || {{ echo >{begun}; read x <{fifo}; {then}; }}"
    return (
        begun,
        fifo,
        f"""case "$*" in
        *batch*) said=$(cat); case "$said" in {match}) {hold} ;; esac; echo "$said" | $REAL "$@" ;;
        *) exec $REAL "$@" ;;
    esac""",
    )


def test_an_address_an_agent_was_killed_over_is_taken(
    equipped: RunningAgent, toolbox: Toolbox, tmp_path: Path, rootfs: str
) -> None:
    """Before it could write it down; nobody asks for the first one again."""
    target = Target(equipped.address, rootfs, box="", pace=1.0, execs=1)

    async def work() -> None:
        begun, fifo, script = held_once(tmp_path, "*alias*", "exit 1")
        async with (
            await connect(target) as client,
            running(target, client) as one,
            running(target, client) as two,
        ):
            with toolbox.replaced("ip", script):
                async with await connect(target) as first:
                    attaching = asyncio.ensure_future(
                        network.attach(first, AttachNetwork(one.container, subnets=SUBNETS, masquerade=False))
                    )
                    assert await asyncio.to_thread(eventually, begun.exists)
                    os.kill(equipped.agent_pid, signal.SIGKILL)
                    attaching.cancel()
                await asyncio.to_thread(fifo.write_text, "go\n")
                second = await network.attach(
                    client, AttachNetwork(two.container, subnets=SUBNETS, masquerade=False)
                )
            there = {
                address
                for each in (await network.state(client, one.container)).interfaces
                for address in each.addresses
            }
            assert not there & set(second.interface.addresses)
        async with await connect(target) as client:
            await network.remove(client, "gcs0")
            assert await names_become(client, "lo") == ["lo"]

    asyncio.run(asyncio.wait_for(work(), 60))


def test_an_agent_killed_over_a_removal_that_has_happened(
    equipped: RunningAgent, toolbox: Toolbox, tmp_path: Path, rootfs: str
) -> None:
    """The client asks again, under the same request_id, and hears that it is done."""
    target = Target(equipped.address, rootfs, box="", pace=1.0, execs=1)
    begun, fifo = tmp_path / "begun", tmp_path / "go"
    os.mkfifo(fifo)
    hold = f"[ -e {begun} ] || {{ echo >{begun}; read x <{fifo}; }}"
    script = f"""case "$*" in
        *batch*) said=$(cat); echo "$said" | $REAL "$@"; case "$said" in *"link del"*) {hold} ;; esac ;;
        *) exec $REAL "$@" ;;
    esac"""

    async def work() -> None:
        async with await connect(target) as client:
            await network.apply(client, ApplyNetwork(interfaces=(Interface("br8", bridge=True),)))
            with toolbox.replaced("ip", script):
                removing = asyncio.ensure_future(network.remove(client, "br8"))
                assert await asyncio.to_thread(eventually, begun.exists)
                os.kill(equipped.agent_pid, signal.SIGKILL)
                await asyncio.to_thread(fifo.write_text, "go\n")
                await removing
            assert await names_become(client, "lo") == ["lo"]

    asyncio.run(asyncio.wait_for(work(), 60))


def test_masquerading_that_cannot_be_looked_at_is_not_replaced(
    equipped: RunningAgent, toolbox: Toolbox, tmp_path: Path, rootfs: str
) -> None:
    """``nft`` is a script that keeps what it is given, and has to be asked twice."""
    target = Target(equipped.address, rootfs, box="", pace=1.0, execs=1)
    loaded, broken = tmp_path / "loaded", tmp_path / "broken"
    script = f"""case "$1" in
        -f) exec cat >{loaded} ;;
    esac
    [ ! -e {broken} ] || kill -9 $$
    [ -e {loaded} ] || {{ echo 'Error: No such file or directory' >&2; exit 1; }}
    echo '{{"nftables":[{{"rule":{{"comment":"10.88.0.0/16"}}}}]}}'
    """

    async def work() -> None:
        async with await connect(target) as client, running(target, client) as box:
            with toolbox.replaced("nft", script):
                await network.attach(client, AttachNetwork(box.container, subnets=SUBNETS[:1]))
                before = loaded.read_text()
                assert "10.88.0.0/16" in before
                broken.touch()
                for bridge, subnet in (("gcs0", SUBNETS[0]), ("gcs1", "10.99.0.0/16")):
                    asked = AttachNetwork(box.container, "eth1", bridge, subnets=(subnet,))
                    with pytest.raises(RpcError, match="nft"):
                        await network.attach(client, asked)
                assert loaded.read_text() == before
                assert (await network.state(client)).masquerade == ()
                assert "gcs1" not in await _names(client)
                broken.unlink()
        async with await connect(target) as client:
            await network.remove(client, "gcs0")

    asyncio.run(asyncio.wait_for(work(), 60))


def test_a_container_that_ends_before_its_turn_comes_is_not_configured(
    equipped: RunningAgent, toolbox: Toolbox, tmp_path: Path, rootfs: str
) -> None:
    target = Target(equipped.address, rootfs, box="", pace=1.0, execs=1)

    async def work() -> None:
        begun, fifo, script = held_once(tmp_path, "*br7*", "true")
        async with (
            await connect(target) as client,
            running(target, client) as one,
            running(target, client) as two,
        ):
            with toolbox.replaced("ip", script):
                bridge = ApplyNetwork(one.container, (Interface("br7", bridge=True),))
                holding = asyncio.ensure_future(network.apply(client, bridge))
                assert await asyncio.to_thread(eventually, begun.exists)
                hosts = ApplyNetwork(two.container, hosts=(HostsEntry("192.0.2.9", ("db",)),))
                waiting = asyncio.ensure_future(network.apply(client, hosts))
                await client.ping()
                await client.kill_container(two.container, "KILL")
                await client.wait_container(two.container)
                await asyncio.to_thread(fifo.write_text, "go\n")
                await holding
                with pytest.raises(RpcError, match="has ended, and its network with it") as caught:
                    await waiting
                assert caught.value.code is Code.FAILED_PRECONDITION

    asyncio.run(asyncio.wait_for(work(), 60))


def test_nobody_s_machine_is_touched(agent: RunningAgent, rootfs: str) -> None:
    """An agent that is not a guest's, in the namespace of who started this machine."""

    async def work() -> None:
        target = Target(agent.address, rootfs, box="", pace=1.0, execs=1)
        async with await connect(target) as client, running(target, client) as box:
            before = await network.state(client)
            for params in (
                ApplyNetwork(interfaces=(Interface("gcs9", bridge=True),)),
                ApplyNetwork(box.container, (Interface("eth0", veth=Veth("gcs9")),)),
            ):
                with pytest.raises(RpcError, match="--own-network") as caught:
                    await network.apply(client, params)
                assert caught.value.code is Code.FAILED_PRECONDITION
            with pytest.raises(RpcError, match="--own-network"):
                await network.attach(client, AttachNetwork(box.container, bridge="gcs9", masquerade=False))
            with pytest.raises(RpcError, match="--own-network"):
                await network.remove(client, "lo")
            now = await network.state(client)
            assert [each.name for each in now.interfaces] == [each.name for each in before.interfaces]

    asyncio.run(work())


@pytest.fixture
def poor(tmp_path: Path) -> Iterator[RunningAgent]:
    """An agent whose machine has neither ip nor nft."""
    for name in ("runc", "mount", "umount", "rm", "unshare", "nsenter", "sysctl"):
        found = shutil.which(name)
        assert found is not None
        (tmp_path / name).symlink_to(found)
    wrapper = (*ALONE, "env", f"PATH={tmp_path}")
    yield from stopped_clean(RunningAgent("--own-network", wrapper=wrapper))


def test_a_tool_that_is_missing_is_named(poor: RunningAgent, tmp_path: Path, rootfs: str) -> None:
    async def work() -> None:
        target = Target(poor.address, rootfs, box="", pace=1.0, execs=1)
        async with await connect(target) as client:
            with pytest.raises(RpcError) as caught:
                await network.state(client)
            assert (caught.value.code, caught.value.details["program"]) == (Code.UNIMPLEMENTED, "ip")
            assert "iproute2" in caught.value.message
            (tmp_path / "ip").symlink_to(shutil.which("ip") or "")
            with pytest.raises(RpcError) as caught:
                await network.apply(client, ApplyNetwork(masquerade=("10.88.0.0/16",)))
            assert (caught.value.code, caught.value.details["program"]) == (Code.UNIMPLEMENTED, "nft")

    asyncio.run(work())
