"""What a pod's files say, which namespaces are joined, and where cgroups go and what they limit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from gcsagent.agent.cgroups import Cgroup, CgroupMounts
from gcsagent.agent.pods import cgroup, files, join, pod, shared
from protocol import checks
from protocol.errors import Code, RpcError
from protocol.pods import (
    Dns,
    HostsEntry,
    PodFiles,
    PodLimits,
    PodMember,
    PodNamespace,
    Sandbox,
)
from protocol.schema import SchemaError, from_wire, to_wire

NETWORK, IPC, UTS, PID, USER = PodNamespace
Json = dict[str, Any]


# -- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "hostname, domainname, line",
    [
        ("web", "", "10.0.0.5\tweb"),
        ("web", "example.org", "10.0.0.5\tweb.example.org web"),
        ("web.example.org", "", "10.0.0.5\tweb.example.org web"),
        ("web.example.org", "example.org", "10.0.0.5\tweb.example.org web"),
        ("web.a.net", "b.net", "10.0.0.5\tweb.a.net web.b.net web"),
    ],
)
def test_a_pods_name_is_there_whole_and_short(hostname: str, domainname: str, line: str) -> None:
    text = files.hosts(hostname, domainname, "10.0.0.5", ())
    assert text.splitlines()[0] == "127.0.0.1\tlocalhost"
    assert text.splitlines()[-1] == line


def test_only_names_of_the_pods_domain_are_shortened() -> None:
    entries = (
        HostsEntry("10.0.0.6", ("db.example.org", "store")),
        HostsEntry("10.0.0.7", ("a.b.example.org",)),
        HostsEntry("10.0.0.8", ("other.net",)),
        HostsEntry("10.0.0.9", ("c.example.org", "c")),
    )
    lines = files.hosts("web", "example.org", "127.0.0.1", entries).splitlines()[-4:]
    assert [line.split("\t")[1] for line in lines] == [
        "db.example.org store db",
        "a.b.example.org",
        "other.net",
        "c.example.org c",
    ]


def test_resolv_conf_has_a_line_per_name_server_and_nothing_for_nothing() -> None:
    assert files.resolv_conf(Dns()) == ""
    assert files.resolv_conf(Dns(("10.0.0.1", "::1"))) == "nameserver 10.0.0.1\nnameserver ::1\n"
    assert files.resolv_conf(Dns((), ("a.net", "b.net"), ("ndots:5", "rotate"))) == (
        "search a.net b.net\noptions ndots:5 rotate\n"
    )


@pytest.mark.parametrize(
    "check, good, bad",
    [
        (
            checks.host_name,
            ["a", "web-1.example.org", "_srv.x", "1.2", "x" * 63],
            ["", "-a", "a-", "a..b", ".a", "a.", "a b", "a\nb", "a\n", "ü", "x" * 64, "a." * 126 + "aa"],
        ),
        (checks.search_domain, [".", "example.org.", "x"], ["", "..", "a b", "a\n"]),
        (
            checks.ip_address,
            ["10.0.0.1", "::1", "fe80::1%eth0", "::ffff:10.0.0.1"],
            [
                "",
                "10.0.0",
                "10.0.0.256",
                "010.0.0.1",
                "::1%",
                "fe80::1%e\nx",
                "10.0.0.1\n",
                "1",
                "fe80::1%a b",
            ],
        ),
        (checks.dns_option, ["ndots:5", "edns0", "no-aaaa"], ["", "ndots: 5", "a\nb", "edns0\n", "A"]),
    ],
)
def test_what_would_be_written_into_a_file_is_checked(check: Any, good: list[str], bad: list[str]) -> None:
    assert [value for value in good if check(value) is not None] == []
    assert [value for value in bad if check(value) is None] == []


@pytest.mark.parametrize(
    "field, value",
    [
        ("address", "10.0.0.1\n127.0.0.1 bank.example.org"),
        ("hosts", [{"address": "10.0.0.1", "names": ["a\n10.0.0.2 b"]}]),
        ("hosts", [{"address": "10.0.0.1", "names": []}]),
        ("dns", {"nameservers": ["10.0.0.1\nsearch x"]}),
        ("dns", {"nameservers": ["10.0.0.1"] * 4}),
        ("dns", {"search": ["x y"]}),
        ("dns", {"options": ["ndots:5\nx"]}),
        ("files", "maybe"),
        ("shm_bytes", -1),
        ("limits", {"memory_bytes": 1}),
    ],
)
def test_a_sandbox_that_cannot_be_names_the_field(field: str, value: Any) -> None:
    with pytest.raises(SchemaError) as caught:
        from_wire(Sandbox, {field: value})
    assert caught.value.field.split(".")[0].split("[")[0] == field


@pytest.mark.parametrize("key", ["hostname", "domainname"])
def test_a_hostname_that_would_add_a_line_is_refused(key: str) -> None:
    with pytest.raises(RpcError) as caught:
        shared.names_of({key: "a\n10.0.0.1 b"})
    assert (caught.value.code, caught.value.details["field"]) == (Code.INVALID_ARGUMENT, f"spec.{key}")


# -- mounts ---------------------------------------------------------------------------------------


def mounted(directory: Path, mounts: list[Json], *share: PodNamespace) -> dict[str, Json]:
    for name in (shared.HOSTS, shared.HOSTNAME):
        (directory / name).write_text("")
    (directory / shared.SHM).mkdir(exist_ok=True)
    spec = {"mounts": mounts}
    shared.mount(spec, str(directory), PodFiles.READ_ONLY, share)
    return {each["destination"]: each for each in spec["mounts"]}


def test_files_go_with_what_is_shared(tmp_path: Path) -> None:
    assert set(mounted(tmp_path, [], NETWORK)) == {"/etc/hosts"}  # there is no resolv.conf
    assert set(mounted(tmp_path, [], UTS)) == {"/etc/hostname"}
    assert set(mounted(tmp_path, [], IPC)) == {"/dev/shm"}
    assert mounted(tmp_path, [], PID) == {}
    found = mounted(tmp_path, [], *PodNamespace)
    assert "ro" in found["/etc/hosts"]["options"]
    assert "rw" in found["/dev/shm"]["options"]
    assert found["/etc/hosts"]["source"] == str(tmp_path / "hosts")


def test_a_mount_of_the_callers_own_stays_but_for_a_tmpfs_on_shm(tmp_path: Path) -> None:
    own = {"destination": "/etc//hosts", "type": "bind", "source": "/etc/hosts", "options": ["bind"]}
    usual = {"destination": "/dev/shm", "type": "tmpfs", "source": "shm"}
    found = mounted(tmp_path, [own, usual], *PodNamespace)
    assert found["/etc//hosts"] is own
    assert "/etc/hosts" not in found
    assert found["/dev/shm"]["source"] == str(tmp_path / "shm")
    given = {"destination": "/dev/shm", "type": "bind", "source": "/s", "options": ["rbind"]}
    assert mounted(tmp_path, [given], *PodNamespace)["/dev/shm"] is given


# -- namespaces -----------------------------------------------------------------------------------


def test_namespaces_are_replaced_by_the_sandboxs_and_names_left_to_it() -> None:
    spec: Json = {
        "hostname": "mine",
        "domainname": "mine",
        "linux": {"namespaces": [{"type": "network"}, {"type": "mount"}, {"type": "uts"}]},
    }
    join.rewrite(spec, 77, (NETWORK, UTS, PID))
    assert spec["linux"]["namespaces"] == [
        {"type": "mount"},
        {"type": "network", "path": "/proc/77/ns/net"},
        {"type": "uts", "path": "/proc/77/ns/uts"},
        {"type": "pid", "path": "/proc/77/ns/pid"},
    ]
    assert not {"hostname", "domainname"} & set(spec)


def test_names_stay_where_uts_is_not_shared() -> None:
    spec: Json = {"hostname": "mine", "linux": {"namespaces": [{"type": "uts"}]}}
    join.rewrite(spec, 77, (IPC,))
    assert spec["hostname"] == "mine"


def test_a_path_beside_sharing_is_a_contradiction() -> None:
    spec: Json = {"linux": {"namespaces": [{"type": "network", "path": "/proc/1/ns/net"}]}}
    with pytest.raises(RpcError) as caught:
        join.rewrite(spec, 77, (NETWORK,))
    assert caught.value.details["field"] == "spec.linux.namespaces[0].path"


def test_a_process_elsewhere_has_not_joined() -> None:
    pid = os.getpid()
    there = join.identities(pid, PodNamespace)
    join.check_joined("web", pid, there)
    device, inode = there["ipc"]
    with pytest.raises(RpcError, match="web has ended meanwhile") as caught:
        join.check_joined("web", pid, {**there, "ipc": [device, inode + 1]})
    assert caught.value.code is Code.FAILED_PRECONDITION
    with pytest.raises(RpcError, match="ended meanwhile"):
        join.check_joined("web", 1 << 22, there)


@pytest.mark.parametrize(
    "role",
    [
        pod.ALONE,
        pod.Role(sandbox=Sandbox("10.0.0.5", dns=Dns(("10.0.0.1",)), limits=PodLimits(pids=7))),
        pod.Role(member=pod.Membership("web", (NETWORK, PID), {"network": [4, 5], "pid": [4, 6]})),
    ],
)
def test_a_role_is_read_as_it_was_written(role: pod.Role) -> None:
    assert pod.read(role.document()) == role
    assert pod.read(None) == pod.ALONE


def test_a_member_shares_what_kubernetes_shares_unless_it_says_otherwise() -> None:
    assert from_wire(PodMember, {"sandbox": "web"}).share == (NETWORK, IPC, UTS)
    assert to_wire(PodMember("web", (PID,))) == {"sandbox": "web", "share": ["pid"]}


# -- limits ---------------------------------------------------------------------------------------

V1 = {
    "memory.limit_in_bytes": "9223372036854771712",
    "cpu.cfs_period_us": "100000",
    "cpu.cfs_quota_us": "-1",
    "cpu.shares": "1024",
    "pids.max": "max",
}
V2 = {"memory.max": "max", "cpu.max": "max 100000", "cpu.weight": "100", "pids.max": "max"}
LIMITS = PodLimits(memory_bytes=1 << 26, cpus=0.5, cpu_shares=2048, pids=-1)


def made_up(where: Path, kind: str, contents: dict[str, str]) -> Cgroup:
    (where / "mounts").write_text(f"c {where} {kind} rw 0 0\n", encoding="ascii")
    (where / "gcs" / "pod").mkdir(parents=True)
    for name, text in contents.items():
        (where / "gcs" / "pod" / name).write_text(f"{text}\n")
    return Cgroup(CgroupMounts(str(where / "mounts")), "/gcs/pod")


def found(where: Path) -> dict[str, str]:
    return {path.name: path.read_text().strip() for path in (where / "gcs" / "pod").iterdir()}


def test_limits_are_written_as_v1_has_them(tmp_path: Path) -> None:
    group = made_up(tmp_path, "cgroup", V1)
    cgroup.apply(group, LIMITS)
    assert found(tmp_path) == {
        **V1,
        "memory.limit_in_bytes": str(1 << 26),
        "cpu.cfs_quota_us": "50000",
        "cpu.shares": "2048",
    }
    cgroup.apply(group, PodLimits())
    assert found(tmp_path) == {**V1, "memory.limit_in_bytes": "-1"}


def test_limits_are_written_as_v2_has_them(tmp_path: Path) -> None:
    group = made_up(tmp_path, "cgroup2", V2)
    cgroup.apply(group, LIMITS)
    assert found(tmp_path) == {
        "memory.max": str(1 << 26),
        "cpu.max": "50000 100000",
        "cpu.weight": "79",
        "pids.max": "max",
    }
    cgroup.apply(group, PodLimits())
    assert found(tmp_path) == V2


def test_a_limit_the_kernel_does_not_have_is_said_before_any_is_written(tmp_path: Path) -> None:
    group = made_up(tmp_path, "cgroup2", {"memory.max": "max"})
    with pytest.raises(RpcError) as caught:
        cgroup.apply(group, PodLimits(memory_bytes=1 << 26, pids=5))
    assert (caught.value.code, caught.value.details["field"]) == (Code.UNIMPLEMENTED, "pids")
    assert found(tmp_path) == {"memory.max": "max"}


def test_what_the_kernel_refuses_leaves_all_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = made_up(tmp_path, "cgroup2", V2)
    write = Cgroup.write

    def refuse(self: Cgroup, name: str, text: str) -> None:
        if name == "pids.max" and text == "5\n":
            raise OSError(22, "Invalid argument")
        write(self, name, text)

    monkeypatch.setattr(Cgroup, "write", refuse)
    with pytest.raises(RpcError) as caught:
        cgroup.apply(group, PodLimits(memory_bytes=1 << 26, pids=5))
    assert (caught.value.code, caught.value.details["field"]) == (Code.INVALID_ARGUMENT, "pids")
    assert found(tmp_path) == V2
