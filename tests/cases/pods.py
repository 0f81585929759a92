"""Cases about pods: what containers share with their sandbox, what they don't, and how a pod ends."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

from gcsagent.host.client import Client
from gcsagent.host.process import RemoteProcess
from protocol.errors import Code
from protocol.pods import Dns, HostsEntry, PodLimits, PodMember, PodNamespace, Sandbox
from protocol.types import OomScope, Reason, Status
from tests.cases.target import (
    MIB,
    OUTPUT,
    Target,
    case,
    connect,
    creation,
    expect,
    name,
    refused,
    run,
    running,
)

NETWORK, IPC, UTS, PID, _USER = PodNamespace

SERVE = """
import ctypes, socket, time
libc = ctypes.CDLL(None)
assert libc.shmget(4711, 4096, 0o1666) >= 0
open('/dev/mqueue/queue', 'w').close()
open('/dev/shm/file', 'w').write('from the sandbox')
s = socket.socket(); s.bind(('127.0.0.1', 8080)); s.listen()
print('ready', flush=True)
time.sleep(100000)
"""
"""Of each kind that can be shared, something to be found."""

LOOK = """
import json, os, socket
def text(path):
    try: return open(path).read()
    except OSError as error: return error.strerror
def dial():
    try: socket.create_connection(('127.0.0.1', 8080), 5).close(); return 'connected'
    except OSError as error: return error.strerror
kinds = ('net', 'ipc', 'uts', 'pid', 'mnt', 'cgroup')
print(json.dumps({
    'namespaces': {kind: os.readlink('/proc/self/ns/' + kind) for kind in kinds},
    'port': dial(),
    'loopback': int(text('/sys/class/net/lo/flags'), 16) & 1,
    'segments': len(text('/proc/sysvipc/shm').splitlines()) - 1,
    'queues': os.listdir('/dev/mqueue'),
    'shm': sorted(os.listdir('/dev/shm')),
    'shm_size': os.statvfs('/dev/shm').f_blocks * os.statvfs('/dev/shm').f_frsize,
    'names': [os.uname().nodename, text('/proc/sys/kernel/domainname').strip()],
    'etc': {name: text('/etc/' + name) for name in ('hosts', 'hostname', 'resolv.conf')},
    'mounts': [line.split()[4] for line in text('/proc/self/mountinfo').splitlines()],
    'processes': [text(f'/proc/{pid}/cmdline') for pid in os.listdir('/proc') if pid.isdigit()],
}))
"""


@contextlib.asynccontextmanager
async def serving(target: Target, client: Client, **options: Any) -> AsyncIterator[RemoteProcess]:
    """A sandbox that has something of every kind; removed at the end."""
    sandbox = Sandbox(
        address="10.0.0.5",
        hosts=(HostsEntry("10.0.0.6", ("db.example.org",)), HostsEntry("fe80::1", ("other.net", "alias"))),
        dns=Dns(("10.0.0.1", "fd00::1"), ("example.org", "."), ("ndots:5", "edns0")),
        shm_bytes=8 * MIB,
        limits=PodLimits(memory_bytes=128 * MIB, pids=60),
    )

    def named(spec: dict[str, Any]) -> None:
        spec["hostname"], spec["domainname"] = "web", "example.org"

    args = ("python3", "-c", SERVE)
    async with running(target, client, *args, sandbox=sandbox, stdio=OUTPUT, spec=named, **options) as init:
        await expect(init.streams["stdout"], b"ready\n")
        yield init


async def look(client: Client, container: str) -> dict[str, Any]:
    done = await run(client, container, "python3", "-c", LOOK)
    assert done.exit.exit_code == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def same(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
    """The kinds of namespaces that two containers have in common."""
    pairs = zip(one["namespaces"].items(), other["namespaces"].values(), strict=True)
    return {kind for (kind, mine), theirs in pairs if mine == theirs}


@case
async def containers_of_a_pod_share_what_they_say_and_no_more(target: Target) -> None:
    """Looked at from inside: ports, IPC, /dev/shm, names, files, processes and mounts."""
    async with (
        await connect(target) as client,
        serving(target, client) as sandbox,
        running(target, client, pod=PodMember(sandbox.container)) as usual,
        running(target, client, pod=PodMember(sandbox.container, (PID,))) as seeing,
        running(target, client, pod=PodMember(sandbox.container, ())) as nothing,
    ):
        own = await look(client, sandbox.container)
        with_pod, with_pid, alone = [await look(client, each.container) for each in (usual, seeing, nothing)]
        assert same(own, with_pod) == {"net", "ipc", "uts"}
        assert same(own, with_pid) == {"pid"}
        assert same(own, alone) == set()
        assert [each["loopback"] for each in (own, with_pod, with_pid, alone)] == [1, 1, 1, 1]

        for found in (own, with_pod):
            assert (found["port"], found["segments"], found["queues"]) == ("connected", 1, ["queue"])
            assert (found["shm"], found["shm_size"]) == (["file"], 8 * MIB)
            assert found["names"] == ["web", "example.org"]
            assert "10.0.0.5\tweb.example.org web\n10.0.0.6\tdb.example.org db\n" in found["etc"]["hosts"]
            assert found["etc"]["hosts"].endswith("\nfe80::1\tother.net alias\n")
            assert found["etc"]["hostname"] == "web\n"
            assert found["etc"]["resolv.conf"] == (
                "nameserver 10.0.0.1\nnameserver fd00::1\nsearch example.org .\noptions ndots:5 edns0\n"
            )
        for found in (with_pid, alone):
            assert (found["port"], found["segments"], found["queues"]) == ("Connection refused", 0, [])
            assert (found["shm"], found["shm_size"]) == ([], 64 * MIB)
            assert "web" not in "".join([*found["names"], *found["etc"].values()])
            assert not [mount for mount in found["mounts"] if mount.startswith("/etc")]
        served = [SERVE in command for command in with_pid["processes"]]
        assert served.count(True) == 1
        assert not [
            command for found in (with_pod, alone) for command in found["processes"] if SERVE in command
        ]

        states = {each.container: each for each in await client.list_containers()}
        shares = {ident: (state.pod, state.share) for ident, state in states.items() if state.pod}
        assert shares == {
            sandbox.container: (sandbox.container, ()),
            usual.container: (sandbox.container, (NETWORK, IPC, UTS)),
            seeing.container: (sandbox.container, (PID,)),
            nothing.container: (sandbox.container, ()),
        }
        pod = states[sandbox.container].cgroup.rpartition("/")[0]
        assert {states[ident].cgroup for ident in shares} == {f"{pod}/{ident}" for ident in shares}


@case
async def a_pod_has_limits_of_its_own_and_ends_with_its_sandbox(target: Target) -> None:
    """The limit that a container runs into is the pod's; the sandbox goes last, or not at all."""
    hog = "import time; held = bytearray(b'x' * (100 << 20)); time.sleep(100000)"
    async with await connect(target) as client, serving(target, client) as sandbox:
        where = sandbox.container
        params = creation(target, name("c"), ("python3", "-c", hog), pod=PodMember(where))
        async with running(target, client, pod=PodMember(where, (NETWORK, PID))) as workload:
            found = await client.pod_stats(where)
            assert (found.container, found.memory.limit, found.pids.limit) == (where, 128 * MIB, 60)
            assert found.pids.current is not None
            assert found.pids.current >= 2
            await client.update_pod(where, memory_bytes=64 * MIB, cpus=0.9, pids=50)
            found = await client.pod_stats(where)
            assert (found.memory.limit, found.cpu.limit, found.pids.limit) == (64 * MIB, 0.9, 50)
            await client.update_pod(where, pids=-1)
            assert (await client.pod_stats(where)).pids.limit is None

            await client.create_container(params)
            await client.start_container(params.container)
            record = await client.wait_container(params.container)
            assert (record.reason, record.signal) == (Reason.OOM, 9)
            assert record.oom is not None
            pod = (await client.container_state(where)).cgroup.rpartition("/")[0]
            assert (record.oom.scope, record.oom.limit_cgroup) == (OomScope.ANCESTOR, pod)
            assert (await client.container_state(where)).status is Status.RUNNING

            await client.kill_container(where, "KILL")
            assert (await client.wait_container(where)).signal == 9
            assert (
                await client.wait_container(workload.container)
            ).signal == 9  # it was in its pid namespace
            with refused(Code.FAILED_PRECONDITION):
                await client.create_container(creation(target, name("c"), ("true",), pod=PodMember(where)))
            with refused(Code.FAILED_PRECONDITION):
                await client.delete_container(where)
            assert await client.delete_container(where, force=True) is not None
            for gone in (workload.container, params.container, where):
                with refused(Code.NOT_FOUND):
                    await client.container_state(gone)
