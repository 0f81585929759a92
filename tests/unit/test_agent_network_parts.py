"""What the tools print and are given, the files, the choice of addresses."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from gcsagent.agent.calls import Outcome
from gcsagent.agent.network import attach, files, kernel, nat, tools
from gcsagent.agent.network import service as network_service
from gcsagent.agent.network.changes import Changes, _Act
from gcsagent.agent.network.kernel import Link
from gcsagent.agent.network.service import NetworkService
from gcsagent.agent.network.tools import Namespace, ToolFailed
from protocol import netchecks
from protocol.errors import Code, RpcError
from protocol.families.network import ApplyNetwork, InterfaceState
from protocol.pods import Dns, HostsEntry
from tests.fakes import watched_loop

if TYPE_CHECKING:
    from gcsagent.agent.registry import Registry

# Of iproute2 6.1 and 6.15, shortened.
ADDRESSES = json.loads("""[
 {"ifindex":1,"ifname":"lo","flags":["LOOPBACK","UP","LOWER_UP"],"mtu":65536,"link_type":"loopback",
  "address":"00:00:00:00:00:00","addr_info":[{"family":"inet","local":"127.0.0.1","prefixlen":8,"scope":"host"}]},
 {"ifindex":2,"link_index":5,"ifname":"eth0","flags":["BROADCAST","UP"],"mtu":1400,"master":"br0",
  "link_type":"ether","address":"52:54:00:12:34:56","permaddr":"52:54:00:00:00:01","ifalias":"hello",
  "linkinfo":{"info_kind":"veth"},"addr_info":[
   {"family":"inet","local":"10.0.0.2","prefixlen":24,"scope":"global"},
   {"family":"inet6","local":"fd00::2","prefixlen":64,"scope":"global","nodad":true},
   {"family":"inet6","local":"2001:db8::9","prefixlen":64,"scope":"global","dynamic":true},
   {"family":"inet6","local":"fe80::1","prefixlen":64,"scope":"link"}]},
 {}]""")
ROUTES = json.loads("""[
 {"dst":"default","gateway":"192.168.9.1","dev":"eth0","protocol":"71","flags":["onlink"]},
 {"dst":"10.0.0.0/24","dev":"eth0","protocol":"kernel","scope":"link","prefsrc":"10.0.0.2","flags":[]},
 {"dst":"10.9.0.7","gateway":"10.0.0.1","dev":"eth0","protocol":"71","metric":5,"flags":[]},
 {"type":"blackhole","dst":"10.66.0.0/16","dev":"lo","flags":[]}]""")


def test_interfaces_are_read() -> None:
    lo, eth0 = kernel.parse_links(ADDRESSES)
    assert (lo.state.kind, lo.state.mac, lo.own) == ("loopback", "", ())
    assert eth0.state == InterfaceState(
        *("eth0", "52:54:00:12:34:56", "veth", 2, 1400),
        up=True,
        running=False,
        master="br0",
        alias="hello",
        addresses=("10.0.0.2/24", "fd00::2/64", "2001:db8::9/64", "fe80::1/64"),
    )
    assert eth0.own == ("10.0.0.2/24", "fd00::2/64")
    assert eth0.macs == ("52:54:00:12:34:56", "52:54:00:00:00:01")
    assert eth0.peer_index == 5


def test_routes_are_read() -> None:
    found = kernel.parse_routes(ROUTES, 4)
    assert [(route.to, route.via, route.metric, route.protocol, route.onlink) for route in found] == [
        ("default", "192.168.9.1", 0, "71", True),
        ("10.0.0.0/24", "", 0, "kernel", False),
        ("10.9.0.7/32", "10.0.0.1", 5, "71", False),
    ]


@pytest.mark.parametrize("text, count", [("", 0), ("\n", 0), ("[]\n[1]\n", 2), ("[1][2]", 2)])
def test_documents_behind_each_other_are_read(text: str, count: int) -> None:
    assert len(tools.parse_documents(text)) == count


def test_a_tool_that_knows_no_json_is_another_one() -> None:
    with pytest.raises(RpcError) as caught:
        tools.parse_documents("1: lo: <LOOPBACK,UP>")
    assert (caught.value.code, caught.value.details["program"]) == (Code.UNIMPLEMENTED, "ip")


@pytest.mark.parametrize(
    "stderr, line, reason",
    [
        ('Cannot find device "nope"\nCommand failed -:2', 2, 'Cannot find device "nope"'),
        ("RTNETLINK answers: File exists\nCommand failed -:11", 11, "File exists"),
        ("Error: Nexthop has invalid gateway.\nCommand failed -:1", 1, "Nexthop has invalid gateway"),
        ("", 0, "exit status 1"),
    ],
)
def test_a_failure_says_which_line_and_why(stderr: str, line: int, reason: str) -> None:
    failure = ToolFailed("ip", Outcome(1, False, stderr))
    assert (failure.line, failure.reason) == (line, reason)


def test_a_namespace_is_entered_by_descriptor() -> None:
    assert tools.argv_in(Namespace(5), ["ip", "link"]) == ["ip", "link"]
    assert tools.argv_in(Namespace(5, 77), ["ip", "link"]) == ["nsenter", "-n/proc/self/fd/3", "ip", "link"]


def test_masquerading_is_one_transaction_and_reads_back() -> None:
    text = nat.ruleset(("10.88.0.0/16", "fd00::/64")).decode()
    assert text.startswith("table inet gcs\ndelete table inet gcs\ntable inet gcs {")
    assert 'ip saddr 10.88.0.0/16 ip daddr != 10.88.0.0/16 masquerade comment "10.88.0.0/16"' in text
    assert 'ip6 saddr fd00::/64 ip6 daddr != fd00::/64 masquerade comment "fd00::/64"' in text
    assert nat.ruleset(()) == b"table inet gcs\ndelete table inet gcs\n"
    listed = {
        "nftables": [{"metainfo": {}}, {"chain": {}}, {"rule": {"comment": "10.88.0.0/16"}}, {"rule": {}}]
    }
    assert nat.parse(json.dumps(listed).encode()) == ("10.88.0.0/16",)
    assert nat.parse(b"no json") == ()
    assert nat.forwarding(("10.0.0.0/8", "fd00::/64")) == {
        "net.ipv4.ip_forward": "1",
        "net.ipv6.conf.all.forwarding": "1",
    }


# -- addresses ------------------------------------------------------------------------------------


def cable(alias: str) -> Link:
    return Link(InterfaceState("x", kind="veth", alias=alias))


def test_the_lowest_free_address_is_given() -> None:
    used = attach.taken(
        [cable("gcs:a/eth0,10.88.0.2/16,fd00::2/64"), cable("gcs:b/eth0,10.88.0.4/16"), cable("")]
    )
    assert used == {"10.88.0.2", "fd00::2", "10.88.0.4"}
    assert attach.choose(("10.88.0.0/16", "fd00::/64"), used) == ("10.88.0.3/16", "fd00::3/64")


def test_a_full_network_is_said() -> None:
    with pytest.raises(RpcError) as caught:
        attach.choose(("10.0.0.0/30",), {"10.0.0.2"})
    assert caught.value.code is Code.RESOURCE_EXHAUSTED
    assert attach.choose(("10.0.0.0/30",), set()) == ("10.0.0.2/30",)


@pytest.mark.parametrize("subnets", [(), ("10.0.0.0/31",), ("10.0.0.0/24", "10.1.0.0/24")])
def test_subnets_nobody_can_use_are_refused(subnets: tuple[str, ...]) -> None:
    with pytest.raises(RpcError) as caught:
        attach.gateways_of(subnets)
    assert caught.value.code is Code.INVALID_ARGUMENT
    assert caught.value.details["field"].startswith("subnets")


def test_the_same_addresses_have_the_same_mac() -> None:
    first = attach.mac_of(("10.88.0.2/16",))
    assert first == attach.mac_of(("10.88.0.2/16",)) != attach.mac_of(("10.88.0.3/16",))
    assert netchecks.mac(first) is None
    assert first.startswith("02:")


# -- files ----------------------------------------------------------------------------------------


def test_resolv_conf_is_read_as_far_as_it_can_be_said() -> None:
    text = "# x\nnameserver 10.0.2.3\nnameserver nonsense\nsearch a.example b\noptions ndots:2 ;bad\nx y\n"
    assert files.parse_resolv_conf(text) == Dns(("10.0.2.3",), ("a.example", "b"), ("ndots:2",))


def test_hosts_knows_localhost() -> None:
    text = files.hosts((HostsEntry("10.0.0.9", ("db", "db.example")),))
    assert text.startswith("127.0.0.1\tlocalhost\n")
    assert text.endswith("10.0.0.9\tdb db.example\n")


@pytest.fixture
def pod(tmp_path: Path) -> Namespace:
    (tmp_path / "hosts").write_text("old and longer than what is new\n")
    return Namespace(-1, os.getpid(), str(tmp_path))


def test_a_pod_s_file_is_written_in_place(pod: Namespace) -> None:
    path = Path(pod.pod_files) / "hosts"
    inode = path.stat().st_ino
    files.write(pod, "hosts", "new\n")
    assert (path.read_text(), path.stat().st_ino, files.read(pod, "hosts")) == ("new\n", inode, "new\n")


def test_a_file_is_written_whole_or_as_it_was(pod: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel takes what still fits on a disk, and says how much that was."""
    path, before = Path(pod.pod_files) / "hosts", b"\xff\n" * 10
    path.write_bytes(before)
    real = os.write

    def write(fd: int, data: bytes) -> int:
        room = 60 - os.fstat(fd).st_size
        if not room:
            raise OSError(errno.ENOSPC, "full")
        return real(fd, data[:room])

    monkeypatch.setattr(os, "write", write)
    changes = Changes(cast("tools.Tools", None), pod)
    asked = ApplyNetwork("c", hosts=(HostsEntry("192.0.2.9", ("db",)),))
    with pytest.raises(RpcError, match="full"):
        service()._files(changes, pod, asked)
    assert path.read_bytes() == before
    assert changes.done == []


def service() -> NetworkService:
    return NetworkService(cast("Registry", SimpleNamespace(caller=None)))


class Hanging:
    """Tools that begin and do not end by themselves; ``ended`` counts those that were broken off."""

    def __init__(self) -> None:
        self.ended = 0

    async def settle(self) -> None:
        pass

    async def change(self, *_: object) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            self.ended += 1


def test_taking_back_that_takes_too_long_is_broken_off(
    pod: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it works with, the namespaces' descriptors and its turn, is somebody else's then."""
    monkeypatch.setattr(network_service, "UNDO_SECONDS", 0.01)

    async def scenario() -> None:
        network, hanging = service(), Hanging()
        network.tools = cast("tools.Tools", hanging)

        async def fail() -> None:
            async with network.changing(pod) as changes:
                changes._undo.append(_Act("what was begun", lambda: hanging.change()))
                raise RpcError(Code.INTERNAL, "no such luck")

        with pytest.raises(RpcError, match="could not all be taken back") as caught:
            await fail()
        assert (caught.value.details["left"], hanging.ended) == (["what had been begun"], 1)

    watched_loop.run(scenario())


def test_what_a_workload_puts_in_a_files_place_is_not_written_to(pod: Namespace) -> None:
    """The agent is held by no cgroup's list of devices: a node could be any disk."""
    path = Path(pod.pod_files) / "hosts"
    path.unlink()
    os.mkfifo(path)
    pipe = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    with pytest.raises(OSError, match="not a regular file"):
        files.write(pod, "hosts", "new\n")
    with pytest.raises(BlockingIOError):
        os.read(pipe, 100)
    os.close(pipe)


# -- checks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "check, good, bad",
    [
        (
            netchecks.ifname,
            ("eth0", "a", "br-1.5", "x" * 15),
            ("", "x" * 16, "a b", "..", "-a", "a/b", "all", 'a"'),
        ),
        (netchecks.mac, ("52:54:00:aa:BB:01",), ("52:54:00:aa:bb", "01:00:5e:00:00:01", "00:00:00:00:00:00")),
        (
            netchecks.interface_address,
            ("10.0.0.1/8", "fd00::1/64"),
            ("10.0.0.1", "10.0.0.1/33", "x/8", "fe80::1%a/64", "10.0.0.1/255.0.0.0"),
        ),
        (netchecks.subnet, ("10.0.0.0/8", "fd00::/64"), ("10.0.0.1/8", "10.0.0.0")),
        (netchecks.destination, ("default", "10.0.0.0/8"), ("0", "10.0.0.1/8")),
    ],
)
def test_values_are_checked(check: object, good: tuple[str, ...], bad: tuple[str, ...]) -> None:
    assert callable(check)
    assert [text for text in good if check(text) is not None] == []
    assert [text for text in bad if check(text) is None] == []


@pytest.mark.parametrize("key", ["kernel.panic", "net", "net.", "net..x", "net/../kernel/panic", "net.a b"])
def test_only_settings_below_net_can_be_named(key: str) -> None:
    assert "only sysctls below net." in (netchecks.sysctls({key: "1"}) or "")
    assert (
        netchecks.sysctls({"net.ipv4.conf.all.forwarding": "1", "net/ipv4/conf/eth0.5/forwarding": "0"})
        is None
    )
    assert netchecks.sysctls({"net.ipv4.ip_forward": "1\n2"}) is not None
