"""What run's and exec's options, in docker's notations, make of the spec; and what is refused at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gcsagent.agent import bundle as agent_bundle
from gcsagent.agent.oci.names import CAPABILITIES as KNOWN_CAPABILITIES
from gcsagent.agent.oci.names import RLIMITS as KNOWN_RLIMITS
from gcsagent.host.cli import option_text, parser
from gcsagent.host.cli.common import UsageError
from gcsagent.host.cli.run import exec_params, run_plan
from gcsagent.host.seccomp_profile import to_oci
from gcsagent.host.spec import ALL_CAPABILITIES, CAPABILITIES
from protocol.address import UnixAddress, VsockAddress
from protocol.families.container import CreateContainer

Json = dict[str, Any]


UNIX = UnixAddress("/s")


def made(*argv: str, address: UnixAddress | VsockAddress = UNIX) -> Json:
    args = parser.parse(["run", "--id", "web", "--rootfs", "/r", *argv, "--", "x"])
    spec = run_plan(args, address).params.spec
    assert spec is not None
    return spec


def process(*argv: str) -> Any:
    return made(*argv)["process"]


def linux(*argv: str) -> Any:
    return made(*argv)["linux"]


def test_without_options_nothing_is_changed() -> None:
    spec = made()
    assert spec["process"]["capabilities"]["bounding"] == CAPABILITIES
    assert {"hooks", "seccomp", "cgroupsPath", "devices", "sysctl"} & (
        set(spec) | set(spec["linux"])
    ) == set()
    assert spec["linux"]["resources"] == {"devices": [{"allow": False, "access": "rwm"}]}


@pytest.mark.parametrize(
    "argv, user",
    [
        ((), {"uid": 0, "gid": 0}),
        (("-u", "7:8"), {"uid": 7, "gid": 8}),
        (("--user", "7"), {"uid": 0, "gid": 0, "username": "7"}),
        (("-u", "www-data"), {"uid": 0, "gid": 0, "username": "www-data"}),
        (("-u", "1000:staff"), {"uid": 0, "gid": 0, "username": "1000:staff"}),
        (
            ("--group-add", "50", "--group-add", "audio"),
            {"uid": 0, "gid": 0, "additionalGids": [50, "audio"]},
        ),
    ],
)
def test_users_are_numbers_or_the_containers_names(argv: tuple[str, ...], user: Json) -> None:
    assert process(*argv)["user"] == user


@pytest.mark.parametrize(
    "argv, gained, lost",
    [
        (("--cap-add", "net_admin"), {"CAP_NET_ADMIN"}, set()),
        (("--cap-add", "CAP_NET_ADMIN", "--cap-drop", "chown"), {"CAP_NET_ADMIN"}, {"CAP_CHOWN"}),
        (("--cap-drop", "ALL"), set(), set(CAPABILITIES)),
        (("--cap-drop", "ALL", "--cap-add", "KILL"), set(), set(CAPABILITIES) - {"CAP_KILL"}),
        (("--cap-add", "ALL"), {"ALL"}, set(CAPABILITIES)),
        (("--cap-add", "all", "--cap-drop", "SYS_ADMIN"), set(ALL_CAPABILITIES) - {"CAP_SYS_ADMIN"}, set()),
        (("--privileged", "--cap-drop", "ALL"), {"ALL"}, set(CAPABILITIES)),
    ],
)
def test_capabilities_are_joined_as_docker_does(
    argv: tuple[str, ...], gained: set[str], lost: set[str]
) -> None:
    sets = process(*argv)["capabilities"]
    assert set(sets) == {"bounding", "effective", "permitted"}
    assert all(set(names) == (set(CAPABILITIES) - lost) | gained for names in sets.values())


def test_both_sides_know_the_same_words() -> None:
    assert set(ALL_CAPABILITIES) == set(KNOWN_CAPABILITIES)
    assert {f"RLIMIT_{name.upper()}" for name in option_text.RLIMITS.split()} == KNOWN_RLIMITS


def test_privileged_lifts_what_keeps_it_from_the_guest() -> None:
    spec = made("--privileged")
    assert spec["process"]["noNewPrivileges"] is False
    assert spec["linux"]["resources"]["devices"] == [{"allow": True, "access": "rwm"}]
    assert spec["linux"]["maskedPaths"] == spec["linux"]["readonlyPaths"] == []
    assert not any("ro" in mount.get("options", []) for mount in spec["mounts"])


def test_limits_of_the_process() -> None:
    argv = (
        "--ulimit",
        "nofile=10:20",
        "--ulimit",
        "core=-1",
        "--ulimit",
        "nproc=5",
        "--oom-score-adj",
        "500",
    )
    made_process = process(*argv)
    assert made_process["rlimits"] == [
        {"type": "RLIMIT_NOFILE", "soft": 10, "hard": 20},
        {"type": "RLIMIT_CORE", "soft": (1 << 64) - 1, "hard": (1 << 64) - 1},
        {"type": "RLIMIT_NPROC", "soft": 5, "hard": 5},
    ]
    assert made_process["oomScoreAdj"] == 500


def test_limits_of_the_cgroup() -> None:
    argv = ("--memory", "64m", "--cpus", "0.5", "--pids-limit", "-1", "--cgroup-parent", "pods/p1")
    made_linux = linux(*argv)
    assert made_linux["cgroupsPath"] == "pods/p1/web"
    resources = made_linux["resources"]
    assert resources["memory"] == {"limit": 64 << 20}
    assert resources["cpu"] == {"period": 100_000, "quota": 50_000}
    assert resources["pids"] == {"limit": -1}
    assert (
        linux("--memory", "64MiB")["resources"]["memory"] == linux("--memory", "64M")["resources"]["memory"]
    )


@pytest.mark.parametrize(
    "argv, mount",
    [
        (("-v", "/a:/b"), ("bind", "/a", "/b", ["rbind", "rw", "rprivate"])),
        (("--volume", "/a:/b:ro"), ("bind", "/a", "/b", ["rbind", "ro", "rprivate"])),
        (("-v", "/a:/b:rslave,ro"), ("bind", "/a", "/b", ["rbind", "ro", "rslave"])),
        (("--mount", "type=bind,src=/a,dst=/b,readonly"), ("bind", "/a", "/b", ["rbind", "ro", "rprivate"])),
        (
            ("--mount", "source=/a,target=/b,bind-propagation=shared"),
            ("bind", "/a", "/b", ["rbind", "rw", "shared"]),
        ),
        (
            ("--mount", "type=tmpfs,destination=/t,tmpfs-size=64m,tmpfs-mode=700"),
            ("tmpfs", "tmpfs", "/t", ["nosuid", "nodev", "noexec", "size=64m", "mode=700"]),
        ),
        (("--tmpfs", "/t"), ("tmpfs", "tmpfs", "/t", ["nosuid", "nodev", "noexec"])),
        (("--tmpfs", "/t:exec,size=1m"), ("tmpfs", "tmpfs", "/t", ["nosuid", "nodev", "exec", "size=1m"])),
    ],
)
def test_mounts(argv: tuple[str, ...], mount: tuple[Any, ...]) -> None:
    kind, source, target, options = mount
    assert made(*argv)["mounts"][-1] == {
        "type": kind,
        "source": source,
        "destination": target,
        "options": options,
    }


def test_a_mount_takes_the_place_of_ours() -> None:
    targets = [each["destination"] for each in made("--tmpfs", "/dev/shm:size=1m")["mounts"]]
    assert targets.count("/dev/shm") == 1
    assert targets[-1] == "/dev/shm"
    shm = next(each for each in made("--shm-size", "1g")["mounts"] if each["destination"] == "/dev/shm")
    assert [option for option in shm["options"] if option.startswith("size=")] == [f"size={1 << 30}"]


def test_relative_sources_are_ours_only_over_unix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert made("-v", "data:/b")["mounts"][-1]["source"] == f"{tmp_path}/data"
    with pytest.raises(UsageError, match="-v data: give an absolute path in the guest"):
        made("-v", "data:/b", address=VsockAddress(3))


@pytest.mark.parametrize(
    "text, device",
    [
        ("/dev/fuse", ("/dev/fuse", "/dev/fuse", "rwm")),
        ("/dev/vda:/dev/disk", ("/dev/disk", "/dev/vda", "rwm")),
        ("/dev/vda:r", ("/dev/vda", "/dev/vda", "r")),
        ("/dev/vda:/dev/disk:rw", ("/dev/disk", "/dev/vda", "rw")),
    ],
)
def test_devices(text: str, device: tuple[str, str, str]) -> None:
    path, source, access = device
    assert linux("--device", text)["devices"] == [{"path": path, "hostPath": source, "access": access}]


def test_namespaces() -> None:
    spec = made("--network", "host", "--pid", "host", "--uts", "host")
    assert {each["type"] for each in spec["linux"]["namespaces"]} == {"ipc", "mount", "cgroup"}
    assert "hostname" not in spec
    spec = made("--hostname", "h", "--domainname", "d", "--sysctl", "net.ipv4.ip_forward=1")
    assert (spec["hostname"], spec["domainname"]) == ("h", "d")
    assert spec["linux"]["sysctl"] == {"net.ipv4.ip_forward": "1"}


def test_user_namespaces() -> None:
    whole = [{"containerID": 0, "hostID": 100_000, "size": 65536}]
    other = [{"containerID": 0, "hostID": 5, "size": 6}]
    for argv, uids, gids in (
        (("--userns", "0:100000:65536"), whole, whole),
        (("--uidmap", "0:100000:65536"), whole, whole),
        (("--uidmap", "0:100000:65536", "--gidmap", "0:5:6"), whole, other),
    ):
        made_linux = linux(*argv)
        assert {"type": "user"} in made_linux["namespaces"]
        assert (made_linux["uidMappings"], made_linux["gidMappings"]) == (uids, gids)
    mounts = made("--userns", "0:1:9", "--network", "host")["mounts"]
    assert next(each for each in mounts if each["destination"] == "/sys")["options"][0] == "rbind"


def test_security_options(tmp_path: Path) -> None:
    profile = tmp_path / "p.json"
    profile.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": []}))
    spec = made(
        "--security-opt", f"seccomp={profile}", "--security-opt", "apparmor=p", "--security-opt", "label=l"
    )
    assert spec["linux"]["seccomp"] == {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": []}
    assert (spec["process"]["apparmorProfile"], spec["process"]["selinuxLabel"]) == ("p", "l")
    assert spec["linux"]["mountLabel"] == "l"
    assert "seccomp" not in linux("--security-opt", "seccomp=unconfined")
    for argv, wanted in (
        ((), True),
        (("--security-opt", "no-new-privileges=false"), False),
        (("--security-opt", "no-new-privileges:false"), False),
        (("--privileged", "--security-opt", "no-new-privileges"), True),
        (("--no-new-privileges", "false"), False),
        (("--privileged", "--no-new-privileges", "true"), True),
    ):
        assert process(*argv)["noNewPrivileges"] is wanted, argv


def test_labels_and_the_environment_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERE", "yes")
    (tmp_path / "env").write_text("# comment\nA=1\n\n  B=two words\nHERE\nNOWHERE_AT_ALL\n")
    argv = ["--env-file", str(tmp_path / "env"), "-e", "A=2", "--label", "k=v", "--label", "e="]
    params = run_plan(parser.parse(["run", "--rootfs", "/r", *argv, "--", "x"]), UnixAddress("/s")).params
    assert params.spec is not None
    assert params.spec["process"]["env"][1:] == ["A=2", "B=two words", "HERE=yes"]
    assert params.labels == {"k": "v", "e": ""}


def test_execs() -> None:
    def params(*argv: str) -> Any:
        return exec_params(parser.parse(["exec", *argv, "web", "x"]), UNIX)

    assert params("-u", "www-data:7", "--group-add", "50").spec["user"] == {
        "username": "www-data:7",
        "additionalGids": [50],
    }
    privileged = params("--privileged").spec
    assert privileged["capabilities"]["effective"] == ["ALL"]
    assert privileged["noNewPrivileges"] is False
    assert "capabilities" not in params().spec
    assert params("--cap-add", "net_admin").add_capabilities == ("CAP_NET_ADMIN",)
    assert params("--cap-add", "all").spec["capabilities"] == privileged["capabilities"]


@pytest.mark.parametrize(
    "argv",
    [
        ["-u", ":x"],
        ["-u", "x:"],
        ["--cap-add", "NET_ADMINS"],
        ["--cap-drop", ""],
        ["--ulimit", "nofile"],
        ["--ulimit", "files=1"],
        ["--ulimit", "nofile=2:1"],
        ["--ulimit", "nofile=-2"],
        ["-v", "/a"],
        ["-v", "/a:b"],
        ["-v", "/a:/b:z"],
        ["--mount", "type=volume,target=/b"],
        ["--mount", "type=bind,target=/b"],
        ["--mount", "type=bind,source=/a,target=b"],
        ["--mount", "type=tmpfs,target=/b,size=1"],
        ["--tmpfs", "t"],
        ["--device", "fuse"],
        ["--device", "/dev/a:/dev/b:rwx"],
        ["--device", "/a:/b:/c:r"],
        ["--sysctl", "net.x"],
        ["--userns", "0:1"],
        ["--userns", "0:1:0"],
        ["--userns", "host"],
        ["--uidmap", "0:4294967295:1"],
        ["--security-opt", "seccomp"],
        ["--security-opt", "systempaths=unconfined"],
        ["--no-new-privileges", "yes"],
        ["--network", "tunnel"],
        ["--pid", "container:x"],
        ["--memory", "lots"],
        ["--cpus", "0"],
        ["--pids-limit", "0"],
        ["--oom-score-adj", "1001"],
        ["--hostname", "x" * 65],
        ["--label", "x"],
        ["--env-file", "/nowhere"],
    ],
    ids=" ".join,
)
def test_a_value_that_is_none_is_refused_in_one_line(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parser.parse(["run", "--rootfs", "/r", *argv, "--", "x"])
    assert caught.value.code == 125
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert argv[0] in lines[0]


@pytest.mark.parametrize(
    "argv",
    [
        ["--userns", "0:1:1", "--uidmap", "0:1:1"],
        ["--gidmap", "0:1:1"],
        ["--uts", "host", "--hostname", "x"],
        ["-v", "/a:/b", "--tmpfs", "/b"],
        ["--security-opt", "seccomp=/dev/null"],
    ],
    ids=" ".join,
)
def test_contradictions_are_refused(argv: list[str]) -> None:
    with pytest.raises(UsageError):
        made(*argv)


@pytest.mark.parametrize(
    "argv",
    [
        ["--cap-add", "KILL"],
        ["--read-only"],
        ["-v", "/a:/b"],
        ["--network", "host"],
        ["--oom-score-adj", "0"],
        ["--user", "x"],
        ["--group-add", "x"],
        ["--memory", "1g"],
        ["--env-file", "/dev/null"],
    ],
    ids=" ".join,
)
def test_a_bundle_takes_no_such_option(argv: list[str]) -> None:
    if argv[0] == "--env-file":
        argv = ["--env-file", __file__]
    with pytest.raises(UsageError, match="cannot be given with --bundle"):
        run_plan(parser.parse(["run", "--bundle", "/b", *argv]), UnixAddress("/s"))
    run_plan(parser.parse(["run", "--bundle", "/b", "--label", "a=b"]), UnixAddress("/s"))


def test_the_agent_takes_what_gcsctl_makes(tmp_path: Path) -> None:
    argv = [
        "--cap-add",
        "ALL",
        "--ulimit",
        "nofile=1:2",
        "--read-only",
        "--tmpfs",
        "/run",
        "-v",
        "/etc:/e:ro",
        "--device",
        "/dev/null",
        "--sysctl",
        "net.ipv4.ip_forward=1",
        "--userns",
        "0:100000:65536",
        "--cgroup-parent",
        "p",
        "--memory",
        "64m",
        "--cpus",
        "1",
        "--pids-limit",
        "9",
        "--shm-size",
        "1m",
        "--oom-score-adj",
        "5",
        "--hostname",
        "h",
        "--domainname",
        "d",
        "-u",
        "5:6",
        "--group-add",
        "7",
    ]
    for options in (argv, ["--privileged"]):
        spec = made(*options)
        spec["root"]["path"] = str(tmp_path)
        agent_bundle.load(CreateContainer("c", spec=spec))


# -- seccomp profiles in the engines' form ----------------------------------------------------------

ENGINES = {
    "defaultAction": "SCMP_ACT_ERRNO",
    "defaultErrnoRet": 1,
    "archMap": [
        {"architecture": "SCMP_ARCH_AARCH64", "subArchitectures": ["SCMP_ARCH_ARM"]},
        {"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86", "SCMP_ARCH_X32"]},
    ],
    "syscalls": [
        {"names": ["read"], "action": "SCMP_ACT_ALLOW", "comment": "x", "includes": {}, "excludes": {}},
        {"names": ["ptrace"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "4.8"}},
        {"names": ["future"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "7.0"}},
        {"names": ["arm"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["arm", "arm64"]}},
        {"names": ["prctl"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["amd64", "x32"]}},
        {
            "names": ["clone"],
            "action": "SCMP_ACT_ALLOW",
            "excludes": {"caps": ["CAP_SYS_ADMIN"], "arches": ["s390"]},
        },
        {"names": ["mount"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_ADMIN"]}},
        {"name": "old", "action": "SCMP_ACT_ERRNO", "errnoRet": 38, "args": None},
    ],
}


@pytest.mark.parametrize("admin, names", [(False, "clone"), (True, "mount")])
def test_conditions_of_an_engines_profile_are_decided(admin: bool, names: str) -> None:
    done = to_oci(ENGINES, "x86_64", ["CAP_SYS_ADMIN"] if admin else [])
    assert done["architectures"] == ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]
    assert done["defaultErrnoRet"] == 1
    assert "archMap" not in done
    assert [rule["names"][0] for rule in done["syscalls"]] == ["read", "ptrace", "prctl", names, "old"]
    assert set().union(*done["syscalls"]) == {"names", "action", "errnoRet", "args"}


@pytest.mark.parametrize(
    "profile, says",
    [
        ([], "must be an object"),
        ({}, "defaultAction"),
        ({"defaultAction": "x", "archMap": []}, "SCMP_ARCH_X86_64"),
        ({"defaultAction": "x", "syscalls": ["read"]}, "array of objects"),
        ({"defaultAction": "x", "syscalls": [{"includes": {"minKernel": "new"}}]}, "no version"),
    ],
)
def test_what_is_no_profile_says_why(profile: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        to_oci(profile, "x86_64", [])
