"""Cases about what a spec asks for, seen from inside: users, privileges, files, limits, namespaces."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gcsagent.host.client import Client
from gcsagent.host.process import Completed, RemoteProcess
from gcsagent.host.spec import exec_spec
from protocol.errors import Code, RpcError
from protocol.families.process import Exec
from tests.cases.target import (
    OUTPUT,
    PIPES,
    Target,
    case,
    connect,
    created,
    creation,
    expect,
    forget,
    name,
    refused,
    run,
    running,
    terminal,
)

PROBE = r"""
import json, os, resource, socket, stat, sys

def attempt(call, *arguments):
    try:
        call(*arguments)
    except OSError as error:
        return error.errno
    return 0

def read(path):
    with open(path) as file:
        return file.read().strip()

status = dict(line.split(":\t", 1) for line in read("/proc/self/status").splitlines() if ":\t" in line)
mounts = {line.split()[4]: line.split() for line in read("/proc/self/mountinfo").splitlines()}
umask = os.umask(0)
facts = {
    "ids": [os.getuid(), os.getgid(), sorted(os.getgroups())],
    "environment": {name: os.environ.get(name) for name in ("HOME", "A", "PATH")},
    "cwd": os.getcwd(),
    "umask": umask,
    "caps": {kind: int(status[kind], 16) for kind in ("CapBnd", "CapEff", "CapPrm", "CapAmb")},
    "no_new_privs": int(status["NoNewPrivs"]),
    "nofile": resource.getrlimit(resource.RLIMIT_NOFILE),
    "core": resource.getrlimit(resource.RLIMIT_CORE),
    "oom": int(read("/proc/self/oom_score_adj")),
    "names": [os.uname().nodename, os.uname().domainname if hasattr(os.uname(), "domainname")
              else read("/proc/sys/kernel/domainname")],
    "interfaces": sorted(name for _, name in socket.if_nameindex()),
    "mounts": {target: fields[5:7] for target, fields in mounts.items()},
}
for key, code in json.loads(sys.argv[1]).items():
    facts[key] = eval(code)
print(json.dumps(facts))
"""


async def probed(process: RemoteProcess) -> Any:
    done = await process.communicate()
    assert done.stderr == b"", done.stderr
    return json.loads(done.stdout)


def probe(**questions: str) -> tuple[str, ...]:
    """``questions`` are Python expressions, evaluated inside."""
    return "python3", "-c", PROBE, json.dumps(questions)


def sets(names: list[str]) -> dict[str, list[str]]:
    return dict.fromkeys(("bounding", "effective", "permitted"), names)


def mask(*names: str) -> int:
    """A capability set as /proc/PID/status shows it: bit numbers are those of capability.h."""
    numbers = {"CAP_CHOWN": 0, "CAP_KILL": 5, "CAP_NET_BIND_SERVICE": 10, "CAP_SYS_TIME": 25}
    return sum(1 << numbers[each] for each in names)


async def execute(
    client: Client, container: str, *args: str, add: tuple[str, ...] = (), **options: Any
) -> Completed:
    """An exec with options of exec_spec; ``add`` are capabilities."""
    params = Exec(container, name("p"), exec_spec(args=args, **options), OUTPUT, add_capabilities=add)
    process = await RemoteProcess.exec(client, params)
    try:
        async with process:
            return await process.communicate()
    finally:
        await forget(client, process)


@case
async def a_process_is_what_its_spec_says(target: Target) -> None:
    kept = ["CAP_CHOWN", "CAP_KILL", "CAP_NET_BIND_SERVICE"]

    def change(spec: dict[str, Any]) -> None:
        spec["hostname"], spec["domainname"] = "inside", "example.org"
        spec["process"].update(
            user={"uid": 1000, "gid": 1001, "additionalGids": [7, "audio"], "umask": 0o27},
            env=["A=b=c", "PATH=/usr/bin:/bin"],
            cwd="/var/tmp",
            capabilities=sets(kept) | {kind: ["CAP_KILL"] for kind in ("inheritable", "ambient")},
            rlimits=[
                {"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200},
                {"type": "RLIMIT_CORE", "soft": 0, "hard": (1 << 64) - 1},
            ],
            oomScoreAdj=321,
            noNewPrivileges=True,
        )
        spec["linux"]["sysctl"] = {"net.ipv4.ip_forward": "1", "kernel.shm_rmid_forced": "1"}

    questions = {
        "forward": "read('/proc/sys/net/ipv4/ip_forward')",
        "shm": "read('/proc/sys/kernel/shm_rmid_forced')",
    }
    async with (
        await connect(target) as client,
        running(target, client, *probe(**questions), stdio=OUTPUT, spec=change) as init,
    ):
        facts = await probed(init)
    assert facts["ids"][:2] == [1000, 1001]
    assert set(facts["ids"][2]) - {1001} == {7, 29}
    assert facts["environment"].pop("HOME") in ("/", None)  # nobody's: runtimes differ
    assert facts["environment"] == {"A": "b=c", "PATH": "/usr/bin:/bin"}
    assert (facts["cwd"], facts["umask"]) == ("/var/tmp", 0o27)
    assert facts["caps"]["CapBnd"] == mask(*kept)
    assert facts["caps"]["CapEff"] == facts["caps"]["CapAmb"] == mask("CAP_KILL")
    assert facts["no_new_privs"] == 1
    assert (facts["nofile"], facts["core"]) == ([100, 200], [0, -1])
    assert facts["oom"] == 321
    assert facts["names"] == ["inside", "example.org"]
    assert facts["interfaces"] == ["lo"]
    assert (facts["forward"], facts["shm"]) == ("1", "1")


FULL = {"type": "c", "major": 1, "minor": 7}


@case
async def files_and_devices_are_what_the_spec_says(target: Target) -> None:
    def change(spec: dict[str, Any]) -> None:
        spec["root"]["readonly"] = True
        tmpfs = {"type": "tmpfs", "source": "tmpfs"}
        etc = {"type": "bind", "source": f"{target.rootfs}/etc"}
        spec["mounts"] += [
            {"destination": "/mnt", **tmpfs, "options": ["nosuid", "nodev", "size=1m", "mode=700"]},
            {"destination": "/opt", **etc, "options": ["rbind", "ro", "rprivate"]},
            {"destination": "/srv", **etc, "options": ["bind", "ro", "rshared"]},
        ]
        spec["linux"]["maskedPaths"] += ["/etc/hostname", "/etc/apt"]
        spec["linux"]["readonlyPaths"] += ["/mnt"]
        spec["linux"]["devices"] = [
            {"path": "/dev/inside", "hostPath": "/dev/cpu_dma_latency", "access": "r", "fileMode": 0o666},
            {"path": "/dev/full2", **FULL, "fileMode": 0o640, "uid": 5, "gid": 6},
            {"path": "/dev/forbidden", "type": "c", "major": 1, "minor": 1, "fileMode": 0o666},
        ]
        spec["linux"]["resources"]["devices"] += [{"allow": True, "access": "rwm", **FULL}]

    questions = {
        "root": "attempt(os.mkdir, '/x')",
        "mnt": "attempt(os.mkdir, '/mnt/x')",
        "opt": "attempt(os.mkdir, '/opt/x')",
        "bound": "os.path.exists('/opt/passwd')",
        "masked": "[read('/etc/hostname'), os.listdir('/etc/apt')]",
        "inside": "[attempt(open, '/dev/inside'), attempt(open, '/dev/inside', 'w')]",
        "full": "[os.stat('/dev/full2').st_rdev, stat.S_IMODE(os.stat('/dev/full2').st_mode),"
        " os.stat('/dev/full2').st_uid, os.stat('/dev/full2').st_gid, attempt(open, '/dev/full2')]",
        "forbidden": "attempt(open, '/dev/forbidden')",
        "null": "attempt(open, '/dev/null', 'w')",
    }
    async with (
        await connect(target) as client,
        running(target, client, *probe(**questions), stdio=OUTPUT, spec=change) as init,
    ):
        facts = await probed(init)
    assert (facts["root"], facts["mnt"], facts["opt"], facts["bound"]) == (30, 30, 30, True)
    assert facts["masked"] == ["", []]
    assert facts["inside"] == [0, 1]
    assert facts["full"] == [1 << 8 | 7, 0o640, 5, 6, 0]
    assert (facts["forbidden"], facts["null"]) == (1, 0)
    assert "ro" in facts["mounts"]["/mnt"][0].split(",")
    # crun 1.8 makes a bind private whatever its options say.
    assert facts["mounts"]["/srv"][1].startswith("shared:") or target.runtime == "crun"
    assert facts["mounts"]["/opt"][1] == "-"


@case
async def users_are_found_by_name_in_the_container(target: Target) -> None:
    """At create in the root's own files; at exec in those the container has by then."""
    whoami = "echo $(id -u):$(id -g):$(id -G):${HOME:-/}"

    def change(spec: dict[str, Any]) -> None:
        spec["process"]["user"] = {"username": "www-data", "additionalGids": ["staff"]}

    async with await connect(target) as client:
        script = f"{whoami}; exec sleep 100000"
        async with running(target, client, "sh", "-c", script, stdio=OUTPUT, spec=change) as init:
            await expect(init.streams["stdout"], rb"33:33:33 50:/var/www\n")
            new = "echo crew:x:700:www-data >>/etc/group; echo me:x:701:702::/srv:/bin/sh >>/etc/passwd"
            done = await execute(client, init.container, "sh", "-c", new, user="0:0")
            assert (done.stdout, done.stderr) == (b"", b"")
            for options, says in (
                ({}, b"33:33:33 50:/var/www"),
                ({"user": "root"}, b"0:0:0:/root"),
                ({"user": "www-data"}, b"33:33:33 700:/var/www"),
                ({"user": "me"}, b"701:702:702:/srv"),
                ({"user": "me:crew", "groups": ["audio"]}, b"701:700:700 29:/srv"),
                ({"user": "1234"}, b"1234:0:0:/"),
                ({"groups": ["crew", "5"]}, b"33:33:33 50 700 5:/var/www"),
            ):
                done = await execute(client, init.container, "sh", "-c", whoami, **options)
                assert sorted(done.stdout.replace(b":", b" ").split()) == sorted(
                    says.replace(b":", b" ").split()
                ), (options, done)
            with refused(Code.NOT_FOUND, field="spec.user.username"):
                await execute(client, init.container, "true", user="nobody-at-all")
            with refused(Code.NOT_FOUND, field="spec.user.additionalGids[0]"):
                await execute(client, init.container, "true", groups=["nobody-at-all"])

        def unknown(spec: dict[str, Any]) -> None:
            spec["process"]["user"] = {"username": "root:nobody-at-all"}

        with refused(Code.NOT_FOUND, field="spec.process.user.username"):
            await client.create_container(creation(target, name("c"), ("true",), spec=unknown))


@case
async def an_exec_may_be_given_more_than_its_container_has(target: Target) -> None:
    caps = ("grep", "-E", "Cap(Eff|Bnd)|NoNew", "/proc/self/status")

    def change(spec: dict[str, Any]) -> None:
        spec["process"]["capabilities"] = sets(["CAP_KILL"])

    def seen(effective: int, no_new: int) -> bytes:
        lines = f"CapEff:\t{effective:016x}\nCapBnd:\t{effective:016x}\nNoNewPrivs:\t{no_new}\n"
        return lines.encode()

    async with await connect(target) as client, running(target, client, spec=change) as init:
        done = await execute(client, init.container, *caps)
        assert done.stdout == seen(mask("CAP_KILL"), 1)
        done = await execute(client, init.container, *caps, add=("CAP_SYS_TIME", "CAP_KILL"))
        assert done.stdout == seen(mask("CAP_KILL", "CAP_SYS_TIME"), 1)
        done = await execute(client, init.container, *caps, privileged=True)
        effective, bounding, no_new = (line.split()[1] for line in done.stdout.splitlines())
        assert (effective, no_new) == (bounding, b"0")
        assert int(effective, 16).bit_count() > 30  # all that the agent has itself
        with refused(Code.INVALID_ARGUMENT, field="add_capabilities[0]"):
            await execute(client, init.container, "true", add=("SYS_TIME",))


MAPPED = [{"containerID": 0, "hostID": 100_000, "size": 65536}]


def mapped(spec: dict[str, Any]) -> None:
    linux = spec["linux"]
    linux["namespaces"].append({"type": "user"})
    linux["uidMappings"] = linux["gidMappings"] = MAPPED


@case
async def a_user_namespaces_root_owns_its_streams_and_its_layer(target: Target) -> None:
    script = (
        "cat /proc/self/uid_map; id -u; for i in 0 1 2; do stat -Lc %u:%g /proc/self/fd/$i; done;"
        " mkdir /made && stat -c %u / /made; echo again >/dev/stderr; cat /dev/stdin; exec sleep 100000"
    )
    async with await connect(target) as client:
        async with running(target, client, "sh", "-c", script, stdio=PIPES, spec=mapped) as init:
            out = init.streams["stdout"]
            await expect(out, rb" +0 +100000 +65536\n0\n0:0\n0:0\n0:0\n0\n0\n")
            await expect(init.streams["stderr"], b"again\n")
            await init.streams["stdin"].write(b"typed")
            await client.close_stdin(init.container, "init", 5)
            await expect(out, b"typed")
            owners = "stat -Lc %u:%g /proc/self/fd/1; echo $(id -u) >/dev/stdout"
            done = await execute(client, init.container, "sh", "-c", owners, user="www-data")
            assert (done.stdout.split(b"\n")[1:], done.stderr) == ([b"33", b""], b"")
            assert done.stdout.startswith(b"33:"), done.stdout
        script = "stat -c %u $(tty); echo typed >/dev/tty; read line; echo got $line"
        async with created(target, client, "sh", "-c", script, stdio=terminal(), spec=mapped) as init:
            await init.start()
            tty = init.streams["tty"]
            await expect(tty, rb"0\r\ntyped\r\n")
            await tty.write(b"hello\n")
            await expect(tty, b"got hello")
            assert (await init.wait()).exit_code == 0

        def unmapped(spec: dict[str, Any]) -> None:
            mapped(spec)
            spec["process"]["user"] = {"uid": 70_000, "gid": 0}

        with refused(Code.INVALID_ARGUMENT, field="spec.process.user.uid"):
            await client.create_container(creation(target, name("c"), ("true",), spec=unmapped))


def guests_cgroups(path: str) -> Any:
    """Its cgroup at ``path``, and the guest's names for cgroups inside."""

    def change(spec: dict[str, Any]) -> None:
        linux = spec["linux"]
        linux["namespaces"] = [each for each in linux["namespaces"] if each["type"] != "cgroup"]
        linux["cgroupsPath"] = path

    return change


@case
async def cgroups_are_where_the_spec_says_below_the_agents_own(target: Target) -> None:
    pod = name("pod")
    async with await connect(target) as client:
        for path in (f"{pod}/c1", f"/{pod}/deep/./er/c2"):
            async with running(target, client, spec=guests_cgroups(path)) as init:
                done = await run(client, init.container, "cat", "/proc/self/cgroup")
                wanted = path.strip("/").replace("./", "")
                found = {line.split(":", 2)[2] for line in done.stdout.decode().splitlines()}
                assert any(each.endswith(f"/{wanted}") and each.startswith("/gcs") for each in found), found
                assert (await client.container_stats(init.container)).pids.current == 1
                for inside in (path, f"{path}/below", pod):
                    taken = guests_cgroups(inside)
                    with refused(Code.FAILED_PRECONDITION, field="spec.linux.cgroupsPath"):
                        await client.create_container(creation(target, name("c"), ("true",), spec=taken))
        for path in ("../x", "/", "system.slice:runc:x"):
            with refused(Code.INVALID_ARGUMENT, field="spec.linux.cgroupsPath"):
                wrong = guests_cgroups(path)
                await client.create_container(creation(target, name("c"), ("true",), spec=wrong))


@case
async def what_is_wrong_with_a_spec_is_named_and_leaves_nothing(target: Target) -> None:
    wrong: list[tuple[Code, str, dict[str, Any]]] = [
        (Code.INVALID_ARGUMENT, "spec.process.rlimits[1].type", {"rlimits": [{"type": "RLIMIT_CPU"}] * 2}),
        (
            Code.INVALID_ARGUMENT,
            "spec.process.capabilities.bounding[0]",
            {"capabilities": sets(["X"])},
        ),
        (Code.INVALID_ARGUMENT, "spec.process.user.uid", {"user": {"uid": 1 << 32, "gid": 0}}),
    ]
    async with await connect(target) as client:
        for code, field, process in wrong:

            def change(spec: dict[str, Any], process: dict[str, Any] = process) -> None:
                spec["process"].update(process)

            with refused(code, field=field):
                await client.create_container(creation(target, name("c"), ("true",), spec=change))

        def no_source(spec: dict[str, Any]) -> None:
            spec["mounts"].append({"destination": "/x", "type": "bind", "source": "/nowhere/at/all"})

        with refused(Code.NOT_FOUND, field="spec.mounts[7].source"):
            await client.create_container(creation(target, name("c"), ("true",), spec=no_source))


@case
async def what_the_kernel_lacks_is_said_in_the_runtimes_words(target: Target) -> None:
    """No kernel has this profile; whether it has AppArmor at all does not matter."""

    def change(spec: dict[str, Any]) -> None:
        spec["process"]["apparmorProfile"] = "no-such-profile"

    params = creation(target, name("c"), ("true",), spec=change)
    async with await connect(target) as client:
        with pytest.raises(RpcError) as caught:
            await client.create_container(params)
        with refused(Code.NOT_FOUND):
            await client.container_state(params.container)
    assert caught.value.code is Code.INTERNAL
    assert "apparmor" in str(caught.value.details["runtime_error"]).lower(), caught.value.details
