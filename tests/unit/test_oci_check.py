"""What is wrong with a spec is said before the runtime is asked, naming the field; what runc takes passes."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest

from gcsagent.agent import bundle
from gcsagent.agent.oci.capabilities import available
from gcsagent.agent.oci.check_namespaces import mapped_root
from gcsagent.agent.oci.look import MAX_ITEMS
from protocol.errors import Code, RpcError
from protocol.families.container import CreateContainer
from protocol.families.process import Exec

ALL_NAMESPACES = [{"type": kind} for kind in ("pid", "network", "mount", "ipc", "uts", "cgroup")]
MAPPED = [{"containerID": 0, "hostID": 100_000, "size": 65536}]


def spec(root: Path, process: dict[str, Any], linux: dict[str, Any], **top: Any) -> dict[str, Any]:
    return {
        "ociVersion": "1.0.2",
        "root": {"path": str(root)},
        "process": {"args": ["sh"], "cwd": "/", **process},
        "linux": {"namespaces": ALL_NAMESPACES, **linux},
        **top,
    }


def load(made: dict[str, Any]) -> dict[str, Any]:
    return bundle.load(CreateContainer("c", spec=made))


def error_of(made: dict[str, Any]) -> RpcError:
    with pytest.raises(RpcError) as caught:
        load(made)
    assert str(caught.value.details["field"]) in caught.value.message
    return caught.value


def rule(**more: Any) -> dict[str, Any]:
    return {
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["x"], "action": "SCMP_ACT_ERRNO", **more}],
    }


@pytest.mark.parametrize(
    "process, field",
    [
        ({"args": ["x", None]}, "args[1]"),
        ({"args": ["x" * (128 * 1024)]}, "args[0]"),
        ({"args": ["x"] * 65537}, "args"),
        ({"args": ["x", "\ud800"]}, "args[1]"),
        ({"env": ["A=1", 2]}, "env[1]"),
        ({"env": ["A=" + "x" * (128 * 1024)]}, "env[0]"),
        ({"env": ["A=1"] * 65537}, "env"),
        ({"cwd": "/\ud800"}, "cwd"),
        ({"user": []}, "user"),
        ({"user": {"uid": -1}}, "user.uid"),
        ({"user": {"uid": 1 << 32}}, "user.uid"),
        ({"user": {"uid": (1 << 32) - 1}}, "user.uid"),
        ({"user": {"uid": True}}, "user.uid"),
        ({"user": {"uid": 1.0}}, "user.uid"),
        ({"user": {"uid": "0"}}, "user.uid"),
        ({"user": {"gid": 1 << 32}}, "user.gid"),
        ({"user": {"umask": 0o1000}}, "user.umask"),
        ({"user": {"username": 3}}, "user.username"),
        ({"user": {"additionalGids": 3}}, "user.additionalGids"),
        ({"user": {"additionalGids": [1, -1]}}, "user.additionalGids[1]"),
        ({"user": {"additionalGids": [1, None]}}, "user.additionalGids[1]"),
        ({"user": {"additionalGids": [1] * 65537}}, "user.additionalGids"),
        ({"capabilities": []}, "capabilities"),
        ({"capabilities": {"bounding": "ALL"}}, "capabilities.bounding"),
        ({"capabilities": {"ambient": ["CAP_KILL", "KILL"]}}, "capabilities.ambient[1]"),
        ({"capabilities": {"effective": ["CAP_NET_ADMIN "]}}, "capabilities.effective[0]"),
        ({"capabilities": {"permitted": [1]}}, "capabilities.permitted[0]"),
        ({"rlimits": {}}, "rlimits"),
        ({"rlimits": [1]}, "rlimits[0]"),
        ({"rlimits": [{"type": "NOFILE", "hard": 1, "soft": 1}]}, "rlimits[0].type"),
        ({"rlimits": [{"hard": 1, "soft": 1}]}, "rlimits[0].type"),
        ({"rlimits": [{"type": "RLIMIT_CORE", "hard": -1, "soft": 0}]}, "rlimits[0].hard"),
        ({"rlimits": [{"type": "RLIMIT_CORE", "hard": 1 << 64}]}, "rlimits[0].hard"),
        ({"rlimits": [{"type": "RLIMIT_CORE", "hard": 1, "soft": 2}]}, "rlimits[0].soft"),
        ({"rlimits": [{"type": "RLIMIT_CPU"}, {"type": "RLIMIT_CPU"}]}, "rlimits[1].type"),
        ({"noNewPrivileges": 1}, "noNewPrivileges"),
        ({"oomScoreAdj": -1001}, "oomScoreAdj"),
        ({"oomScoreAdj": "0"}, "oomScoreAdj"),
        ({"apparmorProfile": 1}, "apparmorProfile"),
        ({"selinuxLabel": "a\0b"}, "selinuxLabel"),
    ],
)
def test_a_process_names_its_field(tmp_path: Path, process: dict[str, Any], field: str) -> None:
    error = error_of(spec(tmp_path, process, {}))
    assert (error.code, error.details["field"]) == (Code.INVALID_ARGUMENT, f"spec.process.{field}")
    with pytest.raises(RpcError) as caught:
        bundle.for_exec(spec(tmp_path, {}, {}), Exec("c", "p", {"args": ["x"], **process}), str(tmp_path))
    assert caught.value.details["field"] == f"spec.{field}"


@pytest.mark.parametrize(
    "linux, field",
    [
        ({"namespaces": {}}, "namespaces"),
        ({"namespaces": ["pid"]}, "namespaces[0]"),
        ({"namespaces": [{}]}, "namespaces[0].type"),
        ({"namespaces": [{"type": "net"}]}, "namespaces[0].type"),
        ({"namespaces": [{"type": "pid"}, {"type": "pid"}]}, "namespaces[1].type"),
        ({"namespaces": [{"type": "network", "path": "ns"}]}, "namespaces[0].path"),
        ({"namespaces": [{"type": "user"}]}, "uidMappings"),
        ({"namespaces": [{"type": "user"}], "uidMappings": MAPPED}, "gidMappings"),
        ({"uidMappings": MAPPED}, "uidMappings"),
        ({"gidMappings": MAPPED}, "gidMappings"),
        ({"namespaces": [{"type": "user"}], "uidMappings": [{"containerID": 1, "size": 5}]}, "uidMappings"),
        ({"uidMappings": [{"containerID": 0, "hostID": 0}]}, "uidMappings[0].size"),
        ({"uidMappings": [{"containerID": 0, "hostID": 0, "size": 0}]}, "uidMappings[0].size"),
        ({"uidMappings": [{"containerID": -1, "size": 1}]}, "uidMappings[0].containerID"),
        ({"uidMappings": [{"hostID": 1 << 32, "size": 1}]}, "uidMappings[0].hostID"),
        ({"uidMappings": [{"hostID": 5, "size": (1 << 32) - 1}]}, "uidMappings[0].size"),
        ({"uidMappings": MAPPED * 341}, "uidMappings"),
        ({"sysctl": []}, "sysctl"),
        ({"sysctl": {"net.ipv4.ip_forward": 1}}, "sysctl.net.ipv4.ip_forward"),
        ({"sysctl": {"kernel.panic": "1"}}, "sysctl.kernel.panic"),
        ({"sysctl": {"vm/overcommit_memory": "1"}}, "sysctl.vm/overcommit_memory"),
        ({"sysctl": {"kernel.hostname": "x"}}, "sysctl.kernel.hostname"),
        ({"sysctl": {"kernel.shmmax": "1"}, "namespaces": []}, "sysctl.kernel.shmmax"),
        ({"sysctl": {"fs.mqueue.msg_max": "1"}, "namespaces": []}, "sysctl.fs.mqueue.msg_max"),
        ({"sysctl": {"net/core/somaxconn": "1"}, "namespaces": []}, "sysctl.net/core/somaxconn"),
        ({"sysctl": {"kernel.domainname": "1"}, "namespaces": []}, "sysctl.kernel.domainname"),
        ({"sysctl": {f"net.x{n}": "1" for n in range(MAX_ITEMS + 1)}}, "sysctl"),
        ({"devices": [{"path": "dev/x", "type": "c"}]}, "devices[0].path"),
        ({"devices": [{"path": "/dev/x", "type": "x"}]}, "devices[0].type"),
        ({"devices": [{"path": "/dev/x", "type": "c", "major": -1}]}, "devices[0].major"),
        ({"devices": [{"path": "/dev/x", "type": "c", "uid": -1}]}, "devices[0].uid"),
        ({"devices": [{"path": "/dev/x", "hostPath": "dev/null"}]}, "devices[0].hostPath"),
        ({"devices": [{"path": "/dev/x", "hostPath": "/etc"}]}, "devices[0].hostPath"),
        ({"devices": [{"path": "/dev/x", "hostPath": "/dev/null", "access": "x"}]}, "devices[0].access"),
        ({"devices": [{"path": "/dev/x", "type": "c", "fileMode": -1}]}, "devices[0].fileMode"),
        ({"resources": []}, "resources"),
        ({"resources": {"memory": {"limit": -2}}}, "resources.memory.limit"),
        ({"resources": {"memory": {"swappiness": 101}}}, "resources.memory.swappiness"),
        ({"resources": {"cpu": {"shares": -1}}}, "resources.cpu.shares"),
        ({"resources": {"cpu": {"quota": "1"}}}, "resources.cpu.quota"),
        ({"resources": {"cpu": {"cpus": 1}}}, "resources.cpu.cpus"),
        ({"resources": {"pids": {"limit": -2}}}, "resources.pids.limit"),
        ({"resources": {"pids": []}}, "resources.pids"),
        ({"resources": {"unified": {"memory.high": 1}}}, "resources.unified.memory.high"),
        ({"resources": {"unified": {"../x": "1"}}}, "resources.unified.../x"),
        ({"resources": {"unified": {"cgroup.procs": "1"}}}, "resources.unified.cgroup.procs"),
        ({"resources": {"devices": [{"allow": "yes"}]}}, "resources.devices[0].allow"),
        ({"resources": {"devices": [{"type": "z"}]}}, "resources.devices[0].type"),
        ({"resources": {"devices": [{"access": "rx"}]}}, "resources.devices[0].access"),
        ({"resources": {"devices": [{"major": -2}]}}, "resources.devices[0].major"),
        ({"resources": {"hugepageLimits": [{"limit": -1}]}}, "resources.hugepageLimits[0].limit"),
        ({"seccomp": []}, "seccomp"),
        ({"seccomp": {"defaultAction": "ALLOW"}}, "seccomp.defaultAction"),
        ({"seccomp": {"syscalls": [{}]}}, "seccomp.defaultAction"),
        ({"seccomp": {**rule(), "architectures": ["x86_64"]}}, "seccomp.architectures[0]"),
        ({"seccomp": {**rule(), "flags": "X"}}, "seccomp.flags"),
        ({"seccomp": rule(names=None)}, "seccomp.syscalls[0].names"),
        ({"seccomp": rule(action="SCMP_ACT_DENY")}, "seccomp.syscalls[0].action"),
        ({"seccomp": rule(errnoRet=-1)}, "seccomp.syscalls[0].errnoRet"),
        ({"seccomp": rule(args=[{"index": 6, "op": "SCMP_CMP_EQ"}])}, "seccomp.syscalls[0].args[0].index"),
        ({"seccomp": rule(args=[{"index": 0, "op": "=="}])}, "seccomp.syscalls[0].args[0].op"),
        ({"maskedPaths": "/x"}, "maskedPaths"),
        ({"maskedPaths": ["/x", "y"]}, "maskedPaths[1]"),
        ({"readonlyPaths": [1]}, "readonlyPaths[0]"),
        ({"readonlyPaths": ["/x"], "namespaces": []}, "readonlyPaths"),
        ({"rootfsPropagation": "both"}, "rootfsPropagation"),
        ({"mountLabel": 1}, "mountLabel"),
        ({"cgroupsPath": 1}, "cgroupsPath"),
    ],
)
def test_the_linux_section_names_its_field(tmp_path: Path, linux: dict[str, Any], field: str) -> None:
    error = error_of(spec(tmp_path, {}, linux))
    assert (error.code, error.details["field"]) == (Code.INVALID_ARGUMENT, f"spec.linux.{field}")


@pytest.mark.parametrize(
    "top, field",
    [
        ({"windows": {}}, "windows"),
        ({"vm": {"kernel": {}}}, "vm"),
        ({"hostname": 1}, "hostname"),
        ({"hostname": "x" * 65}, "hostname"),
        ({"hostname": "x", "linux": {}}, "hostname"),
        ({"domainname": "x", "linux": {}}, "domainname"),
        ({"annotations": []}, "annotations"),
        ({"mounts": {}}, "mounts"),
        ({"mounts": ["/x"]}, "mounts[0]"),
        ({"mounts": [{}]}, "mounts[0].destination"),
        ({"mounts": [{"destination": "data"}]}, "mounts[0].destination"),
        ({"mounts": [{"destination": "/x", "type": 1}]}, "mounts[0].type"),
        ({"mounts": [{"destination": "/x", "options": "ro"}]}, "mounts[0].options"),
        ({"mounts": [{"destination": "/x", "options": ["ro", ""]}]}, "mounts[0].options[1]"),
        ({"mounts": [{"destination": "/x", "type": "bind"}]}, "mounts[0].source"),
        ({"mounts": [{"destination": "/x"}] * (MAX_ITEMS + 1)}, "mounts"),
        ({"hooks": []}, "hooks"),
        ({"hooks": {"prestart": {}}}, "hooks.prestart"),
        ({"hooks": {"prestart": [{}]}}, "hooks.prestart[0].path"),
        ({"hooks": {"createRuntime": [{"path": "true"}]}}, "hooks.createRuntime[0].path"),
        ({"hooks": {"poststop": [{"path": "/bin/sh", "args": "x"}]}}, "hooks.poststop[0].args"),
        ({"hooks": {"poststop": [{"path": "/bin/sh", "env": ["x"]}]}}, "hooks.poststop[0].env[0]"),
        ({"hooks": {"poststart": [{"path": "/bin/sh", "timeout": 0}]}}, "hooks.poststart[0].timeout"),
        ({"hooks": {"prestart": [{"path": "/bin/sh"}] * 65}}, "hooks.prestart"),
    ],
)
def test_the_rest_names_its_field(tmp_path: Path, top: dict[str, Any], field: str) -> None:
    error = error_of({**spec(tmp_path, {}, {}), **top})
    assert (error.code, error.details["field"]) == (Code.INVALID_ARGUMENT, f"spec.{field}")


@pytest.mark.parametrize(
    "top, field",
    [
        ({"mounts": [{"destination": "/x", "type": "bind", "source": "/nowhere"}]}, "mounts[0].source"),
        ({"mounts": [{"destination": "/x", "options": ["rbind"], "source": "/no"}]}, "mounts[0].source"),
        ({"hooks": {"createContainer": [{"path": "/nowhere"}]}}, "hooks.createContainer[0].path"),
        ({"hooks": {"startContainer": [{"path": "/bin/sh"}]}}, "hooks.startContainer[0].path"),
        ({"linux": {"devices": [{"path": "/dev/nowhere"}]}}, "linux.devices[0].path"),
        ({"linux": {"namespaces": [{"type": "network", "path": "/no"}]}}, "linux.namespaces[0].path"),
    ],
)
def test_what_is_not_there_is_not_found(tmp_path: Path, top: dict[str, Any], field: str) -> None:
    error = error_of({**spec(tmp_path, {}, {}), **top})
    assert (error.code, error.details["field"]) == (Code.NOT_FOUND, f"spec.{field}")


def test_a_hook_must_be_executable(tmp_path: Path) -> None:
    (tmp_path / "hook").touch()
    for kind, path in (("poststop", f"{tmp_path}/hook"), ("prestart", "/etc"), ("startContainer", "/hook")):
        error = error_of(spec(tmp_path, {}, {}, hooks={kind: [{"path": path}]}))
        assert (error.code, error.details["field"]) == (
            Code.PERMISSION_DENIED,
            f"spec.hooks.{kind}[0].path",
        )


def test_a_hook_that_a_mount_will_bring_is_the_runtimes_to_find(tmp_path: Path) -> None:
    mounts = [{"destination": "/opt/", "type": "bind", "source": "/usr"}]
    load(spec(tmp_path, {}, {}, mounts=mounts, hooks={"startContainer": [{"path": "/opt/bin/env"}]}))


def test_ids_must_be_mapped(tmp_path: Path) -> None:
    mapped = {
        "namespaces": [*ALL_NAMESPACES, {"type": "user"}],
        "uidMappings": MAPPED,
        "gidMappings": [{"containerID": 0, "hostID": 5, "size": 10}],
    }
    assert mapped_root(load(spec(tmp_path, {}, mapped))) == (100_000, 5)
    assert mapped_root(load(spec(tmp_path, {}, {}))) is None
    load(spec(tmp_path, {"user": {"uid": 65535, "gid": 9}}, mapped))
    for user, field in (
        ({"uid": 65536}, "uid"),
        ({"uid": 0, "gid": 10}, "gid"),
        ({"username": "70000:0"}, "uid"),
    ):
        error = error_of(spec(tmp_path, {"user": user}, mapped))
        assert error.code is Code.INVALID_ARGUMENT
        assert error.details["field"] == f"spec.process.user.{field}"


def test_what_runc_takes_passes_as_it_is(tmp_path: Path) -> None:
    """Unknown keys, nulls for absent values, and the odd corners of real specs."""
    (tmp_path / "etc").mkdir()
    made = spec(
        tmp_path,
        {
            "user": {"uid": 4294967294, "gid": 0, "additionalGids": [0, 4294967294], "umask": 0o22},
            "env": None,
            "capabilities": {"bounding": ["CAP_KILL", "CAP_KILL"], "inheritable": None, "future": 3},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": (1 << 64) - 1, "soft": 0}],
            "oomScoreAdj": None,
            "scheduler": {"policy": "SCHED_OTHER"},
            "ioPriority": {"class": "IOPRIO_CLASS_IDLE"},
        },
        {
            "namespaces": [*ALL_NAMESPACES, {"type": "time"}],
            "uidMappings": [],
            "sysctl": {
                "net.ipv4.ip_unprivileged_port_start": "0",
                "net/ipv4/conf/eth0.100/forwarding": "1",
                "kernel.shm_rmid_forced": "1",
                "fs.mqueue.msg_max": "20",
                "kernel.domainname": "x",
            },
            "resources": {
                "memory": {"limit": -1, "swap": -1, "disableOOMKiller": False},
                "cpu": {"shares": 0, "quota": -1, "period": 100000, "idle": 1},
                "pids": {"limit": 0},
                "devices": [{"allow": False, "access": "rwm"}, {"allow": True, "type": "c", "major": 1}],
                "unified": {"memory.high": "max"},
                "rdma": {"x": 1},
            },
            "devices": [{"path": "/dev/fifo", "type": "p"}, {"path": "/dev/n", "type": "u", "minor": 3}],
            "seccomp": {"defaultAction": "", "syscalls": None},
            "intelRdt": {"closID": "x"},
            "maskedPaths": ["/proc/kcore"],
            "readonlyPaths": None,
            "rootfsPropagation": "",
            "personality": {"domain": "LINUX"},
        },
        mounts=[
            {"destination": "/proc", "type": "proc", "source": "proc", "options": None},
            {"destination": "/x", "type": "none", "source": "/etc", "options": ["rbind", "idmap"]},
            {"destination": "/x", "type": "tmpfs"},
        ],
        hooks={"prestart": None, "poststop": [{"path": "/bin/sh", "env": None, "timeout": 5}], "other": 1},
        annotations=None,
        windows=None,
        future={"a": [1]},
    )
    before = json.dumps(made)
    loaded = load(made)
    assert json.dumps(made) == before
    loaded["linux"].pop("seccomp")
    wanted = copy.deepcopy(made)
    wanted["linux"].pop("seccomp")
    wanted["process"]["env"] = []
    assert loaded == wanted


def test_a_domainname_becomes_its_sysctl_unless_that_is_given(tmp_path: Path) -> None:
    loaded = load(spec(tmp_path, {}, {}, domainname="example.org"))
    assert loaded["linux"]["sysctl"] == {"kernel.domainname": "example.org"}
    loaded = load(spec(tmp_path, {}, {"sysctl": {"kernel.domainname": "mine"}}, domainname="x"))
    assert loaded["linux"]["sysctl"] == {"kernel.domainname": "mine"}


def test_a_device_of_the_guests_gets_its_numbers_and_a_rule(tmp_path: Path) -> None:
    rule = {"allow": False, "access": "rwm"}
    devices = [{"path": "/dev/inside", "hostPath": "/dev/null", "access": "r", "fileMode": 0o600}]
    made = spec(tmp_path, {}, {"devices": devices, "resources": {"devices": [rule]}})
    linux = load(made)["linux"]
    info = os.stat("/dev/null")
    numbers = {"type": "c", "major": 1, "minor": 3}
    owner = {"uid": info.st_uid, "gid": info.st_gid}
    assert linux["devices"] == [{"path": "/dev/inside", "fileMode": 0o600, **numbers, **owner}]
    assert linux["resources"]["devices"] == [rule, {"allow": True, "access": "r", **numbers}]
    linux = load(spec(tmp_path, {}, {"devices": [{"path": "/dev/zero"}]}))["linux"]
    assert linux["resources"]["devices"] == [
        {"allow": True, "access": "rwm", "type": "c", "major": 1, "minor": 5}
    ]


def test_an_execs_capabilities_are_put_on_top_of_the_containers(tmp_path: Path) -> None:
    kept = ["CAP_KILL", "CAP_CHOWN"]
    container = spec(tmp_path, {"capabilities": {"bounding": kept, "ambient": ["CAP_KILL"]}}, {})
    params = Exec("c", "p", {"args": ["x"]}, add_capabilities=("CAP_SYS_TIME", "CAP_KILL"))
    more = ["CAP_SYS_TIME", "CAP_KILL"]
    assert bundle.for_exec(container, params, str(tmp_path))["capabilities"] == {
        "bounding": [*kept, "CAP_SYS_TIME"],
        "effective": more,
        "permitted": more,
        "ambient": ["CAP_KILL"],
    }
    with pytest.raises(RpcError) as caught:
        bundle.for_exec(container, Exec("c", "p", {"args": ["x"]}, add_capabilities=("KILL",)), "/")
    assert caught.value.details["field"] == "add_capabilities[0]"


def test_all_is_what_the_agent_may_give(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tx\nCapPrm:\t0000000000000000\nCapBnd:\t0000010000200021\n")
    some = ["CAP_CHOWN", "CAP_KILL", "CAP_SYS_ADMIN", "CAP_CHECKPOINT_RESTORE"]
    assert available(str(status)) == some
    capabilities = {"bounding": ["ALL"], "effective": ["CAP_KILL", "ALL"], "permitted": ["CAP_KILL"]}
    made = load(spec(tmp_path, {"capabilities": capabilities}, {}))["process"]["capabilities"]
    assert made == {"bounding": available(), "effective": available(), "permitted": ["CAP_KILL"]}


def test_a_config_that_is_a_named_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(RpcError, match="is not JSON"):
        bundle.load(CreateContainer("c", bundle=str(tmp_path)))
