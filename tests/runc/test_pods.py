"""Pods on an agent that is killed, and what is refused of them; gcsctl's part in real containers."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from gcsagent.host.client import Client
from gcsagent.host.process import RemoteProcess
from protocol.errors import Code, RpcError
from protocol.pods import Dns, PodFiles, PodLimits, PodMember, PodNamespace, Sandbox
from protocol.types import Status
from tests.cases.agents import RunningAgent, eventually, stopped_clean
from tests.cases.oci import mapped
from tests.cases.target import (
    MIB,
    OUTPUT,
    Target,
    connect,
    created,
    creation,
    event,
    expect,
    name,
    refused,
    remove,
    run,
    running,
)
from tests.fakes.slow_runc import Slow
from tests.runc.test_gcsctl_real import Gcsctl, one_line
from tests.runc.test_reload import at

NETWORK, IPC, UTS, PID, USER = PodNamespace


@pytest.fixture
def fresh() -> Iterator[RunningAgent]:
    yield from stopped_clean(RunningAgent("--log-level", "debug"))


@pytest.fixture
def target(agent: RunningAgent, rootfs: str) -> Iterator[Target]:
    before = agent.holdings()
    yield Target(agent.address, rootfs, box="", pace=1.0, execs=1)
    agent.assert_holds(before)


@asynccontextmanager
async def pod(target: Target, client: Client, **options: Any) -> AsyncIterator[str]:
    """A running sandbox, removed at the end with all of its pod."""
    change = options.pop("spec", None)
    params = creation(target, name("pod"), ("sleep", "100000"), sandbox=Sandbox(**options), spec=change)
    await client.create_container(params)
    try:
        await client.start_container(params.container)
        yield params.container
    finally:
        await remove(client, params.container)


async def said(client: Client, container: str, script: str) -> str:
    done = await run(client, container, "sh", "-c", script)
    assert done.exit.exit_code == 0, done.stderr
    return done.stdout.decode()


async def start(client: Client, target: Target, **more: Any) -> str:
    params = creation(target, name("c"), ("sleep", "100000"), **more)
    await client.create_container(params)
    await client.start_container(params.container)
    return params.container


def mounts(running: RunningAgent) -> list[str]:
    lines = Path(f"/proc/{running.pid}/mounts").read_text().splitlines()
    return [line for line in lines if str(running.directory) in line and "/pod/" in line]


def test_a_successor_knows_the_pod_and_goes_on_with_it(fresh: RunningAgent, rootfs: str) -> None:
    """Its containers, what they share, its limits; a container is added, the pod is refused and forced."""
    target = at(fresh, rootfs)

    async def before() -> tuple[str, str]:
        async with await connect(target) as client:
            sandbox = await start(client, target, sandbox=Sandbox(limits=PodLimits(pids=70)))
            old = await start(client, target, pod=PodMember(sandbox))
            await said(client, old, "echo kept >/dev/shm/file")
            await client.update_pod(sandbox, memory_bytes=96 * MIB)
            return sandbox, old

    async def after(sandbox: str, old: str) -> None:
        async with await connect(target) as client:
            states = {each.container: each for each in await client.list_containers()}
            assert (states[old].pod, states[old].share) == (sandbox, (NETWORK, IPC, UTS))
            assert states[sandbox].pod == sandbox
            found = await client.pod_stats(sandbox)
            assert (found.memory.limit, found.pids.limit) == (96 * MIB, 70)
            new = await start(client, target, pod=PodMember(sandbox, (IPC, PID)))
            assert await said(client, new, "cat /dev/shm/file") == "kept\n"
            with refused(Code.FAILED_PRECONDITION):
                await client.delete_container(sandbox)
            assert await client.delete_container(sandbox, force=True) is not None
            assert await client.list_containers() == ()

    sandbox, old = asyncio.run(before())
    for file in ("memory.limit_in_bytes", "memory.max"):  # as if the kill had come amid an update
        for path in fresh.cgroups():
            where = Path(path, file)
            if path.endswith(f"/{sandbox}") and where.exists() and not path.endswith(f"/{sandbox}/{sandbox}"):
                where.write_text(str(200 * MIB))
    fresh.kill_agent()
    assert len(mounts(fresh)) == 1
    asyncio.run(after(sandbox, old))
    assert mounts(fresh) == []
    assert eventually(lambda: not [path for path in fresh.cgroups() if sandbox in path])


def test_a_sandbox_whose_state_is_broken_takes_its_pod_along(fresh: RunningAgent, rootfs: str) -> None:
    target = at(fresh, rootfs)

    async def before() -> tuple[str, str]:
        async with await connect(target) as client:
            sandbox = await start(client, target, sandbox=Sandbox())
            return sandbox, await start(client, target, pod=PodMember(sandbox))

    async def after(sandbox: str, one: str) -> None:
        async with await connect(target) as client:
            assert (await client.container_state(sandbox)).status is Status.FAILED
            assert await said(client, one, "echo alive") == "alive\n"
            with pytest.raises(RpcError, match=one) as caught:
                await client.delete_container(sandbox)
            assert caught.value.code is Code.FAILED_PRECONDITION
            with refused(Code.FAILED_PRECONDITION, field="pod.sandbox"):
                await start(client, target, pod=PodMember(sandbox))
            await client.delete_container(sandbox, force=True)
            assert await client.list_containers() == ()

    sandbox, one = asyncio.run(before())
    (fresh.state_dir / "containers" / sandbox / "container.json").write_text("rubbish")
    fresh.kill_agent()
    asyncio.run(after(sandbox, one))
    assert mounts(fresh) == []
    assert eventually(lambda: not [path for path in fresh.cgroups() if sandbox in path])


def test_a_forced_deletion_is_finished_by_the_successor(fresh: RunningAgent, rootfs: str) -> None:
    """As it stands on disk when the agent is killed right after it has begun."""
    target = at(fresh, rootfs)

    async def before() -> str:
        async with await connect(target) as client:
            sandbox = await start(client, target, sandbox=Sandbox())
            await start(client, target, pod=PodMember(sandbox, (PID,)))
            return sandbox

    async def gone() -> bool:
        async with await connect(target) as client:
            return await client.list_containers() == ()

    sandbox = asyncio.run(before())
    document = fresh.state_dir / "containers" / sandbox / "container.json"
    document.write_text(json.dumps({**json.loads(document.read_text()), "status": "deleting"}))
    fresh.kill_agent()
    assert eventually(lambda: asyncio.run(gone()))
    assert mounts(fresh) == []


def test_the_end_of_the_agent_lets_containers_end_before_their_sandbox(
    fresh: RunningAgent, rootfs: str
) -> None:
    """Those that take their time have their grace; that nothing is left is the fixture's to see."""
    target, out = at(fresh, rootfs), fresh.directory / "out"
    out.mkdir()
    script = "trap 'sleep 0.3; echo ended >/out/word; exit' TERM; echo ready; while :; do sleep 0.01; done"

    def bound(spec: dict[str, Any]) -> None:
        spec["mounts"].append(
            {"destination": "/out", "type": "bind", "source": str(out), "options": ["bind", "rw"]}
        )

    async def body() -> None:
        async with await connect(target) as client:
            idle = "trap exit TERM; while :; do sleep 0.01; done"
            box = creation(target, name("pod"), ("sh", "-c", idle), sandbox=Sandbox())
            await client.create_container(box)
            await client.start_container(box.container)
            pod, args = PodMember(box.container, (PID,)), ("sh", "-c", script)
            params = creation(target, name("c"), args, pod=pod, spec=bound, stdio=OUTPUT)
            init = await RemoteProcess.create(client, params)
            await init.start()
            await expect(init.streams["stdout"], b"ready\n")
            init.detach()

    asyncio.run(body())
    assert fresh.stop() == 0
    assert (out / "word").read_text() == "ended\n"


def test_containers_outlive_their_sandbox_unless_they_share_its_processes(target: Target) -> None:
    async def body() -> None:
        async with await connect(target) as client, pod(target, client) as sandbox:
            kept = await start(client, target, pod=PodMember(sandbox))
            theirs = await start(client, target, pod=PodMember(sandbox, (PID,)))
            await said(client, kept, "echo kept >/dev/shm/file")
            await client.kill_container(sandbox, "KILL")
            assert (await client.wait_container(sandbox)).signal == 9
            assert (await client.wait_container(theirs)).signal == 9
            assert await said(client, kept, "cat /dev/shm/file; hostname") == f"kept\n{sandbox}\n"
            with refused(Code.FAILED_PRECONDITION):
                await start(client, target, pod=PodMember(sandbox))
            assert (await client.pod_stats(sandbox)).pids.current == 1
            await client.delete_container(theirs)
            await client.delete_container(kept, force=True)
            await client.delete_container(sandbox)

    asyncio.run(body())


def test_init_of_a_container_with_shared_processes_takes_its_own_along(target: Target) -> None:
    """It is no process 1: what it leaves behind is ended by the agent, and nobody else's."""

    async def body() -> None:
        async with await connect(target) as client, pod(target, client) as sandbox:
            script = "sleep 4711 & sleep 4711 & sleep 0.2"
            params = creation(target, name("c"), ("sh", "-c", script), pod=PodMember(sandbox, (PID,)))
            await client.create_container(params)
            await client.start_container(params.container)
            assert (await client.wait_container(params.container)).exit_code == 0
            listed = await said(client, sandbox, "cat /proc/[0-9]*/cmdline | tr '\\0' ' '")
            assert "sleep 100000" in listed
            assert "sleep 4711" not in listed

    asyncio.run(body())


def test_a_sandbox_with_auto_delete_waits_for_its_pod(target: Target) -> None:
    async def body() -> None:
        async with await connect(target) as client, await client.events() as events:
            sandbox = await start(client, target, sandbox=Sandbox(), auto_delete=True)
            last = await start(client, target, pod=PodMember(sandbox))
            await client.kill_container(sandbox, "KILL")
            await event(events, "container.stopped", sandbox)
            assert (await client.container_state(sandbox)).status is Status.STOPPED
            await client.delete_container(last, force=True)
            await event(events, "container.deleted", sandbox)

    asyncio.run(body())


def test_files_are_written_to_or_not_there_as_was_asked(target: Target) -> None:
    async def body() -> None:
        async with await connect(target) as client:
            async with pod(target, client, files=PodFiles.WRITABLE, shm_bytes=0) as sandbox:
                one = await start(client, target, pod=PodMember(sandbox))
                await said(client, one, "echo 10.9.9.9 added >>/etc/hosts; echo x >/dev/shm/own")
                assert "added" in await said(client, sandbox, "cat /etc/hosts")
                assert await said(client, sandbox, "ls /dev/shm") == ""
                other = await start(client, target, pod=PodMember(sandbox, (IPC,)))
                assert "added" not in await said(client, other, "cat /etc/hosts")
            async with pod(target, client, dns=Dns(("10.0.0.1",))) as sandbox:
                for path in ("/etc/hosts", "/etc/hostname", "/etc/resolv.conf"):
                    done = await run(client, sandbox, "sh", "-c", f"echo x >>{path}")
                    assert b"Read-only file system" in done.stderr
            async with pod(target, client, files=PodFiles.NONE, dns=Dns(("10.0.0.1",))) as sandbox:
                assert "/etc/" not in await said(client, sandbox, "cat /proc/self/mounts")

    asyncio.run(body())


def test_what_cannot_be_is_refused_and_leaves_nothing(target: Target) -> None:
    def path(spec: dict[str, Any]) -> None:
        spec["linux"]["namespaces"] = [{"type": "mount"}, {"type": "network", "path": "/proc/self/ns/net"}]
        del spec["hostname"]

    def sysctl(spec: dict[str, Any]) -> None:
        spec["linux"]["sysctl"] = {"net/ipv4/ip_forward": "1"}

    def elsewhere(spec: dict[str, Any]) -> None:
        spec["linux"]["cgroupsPath"] = "another/place"

    def shallow(spec: dict[str, Any]) -> None:
        spec["linux"]["cgroupsPath"] = "top"

    def injected(spec: dict[str, Any]) -> None:
        spec["hostname"] = "a\n10.0.0.1 b"

    async def body() -> None:
        async with await connect(target) as client, pod(target, client) as sandbox:
            where = PodMember(sandbox)
            plain = await start(client, target)

            async def create(**more: Any) -> None:
                await client.create_container(creation(target, name("c"), ("true",), **more))

            with refused(Code.NOT_FOUND):
                await create(pod=PodMember("nobody"))
            with refused(Code.FAILED_PRECONDITION, field="pod.sandbox"):
                await create(pod=PodMember(plain))
            with refused(Code.INVALID_ARGUMENT, field="pod.share"):
                await create(pod=PodMember(sandbox, (USER,)))
            with refused(Code.INVALID_ARGUMENT, field="pod"):
                await create(pod=where, sandbox=Sandbox())
            with refused(Code.INVALID_ARGUMENT, field="spec.linux.namespaces[1].path"):
                await create(pod=where, spec=path)
            with refused(Code.INVALID_ARGUMENT, field="spec.linux.sysctl.net/ipv4/ip_forward"):
                await create(pod=where, spec=sysctl)
            with refused(Code.INVALID_ARGUMENT, field="spec.linux.cgroupsPath"):
                await create(pod=where, spec=elsewhere)
            with refused(Code.INVALID_ARGUMENT, field="spec.linux.cgroupsPath"):
                await create(sandbox=Sandbox(), spec=shallow)
            with refused(Code.INVALID_ARGUMENT, field="spec.hostname"):
                await create(sandbox=Sandbox(), spec=injected)
            for inside in (f"{sandbox}/x", sandbox, f"{sandbox}/{sandbox}/x"):
                with refused(Code.FAILED_PRECONDITION, field="spec.linux.cgroupsPath"):
                    await create(spec=lambda spec, at=inside: spec["linux"].update(cgroupsPath=at))
            with refused(Code.FAILED_PRECONDITION, field="spec.linux.cgroupsPath"):
                await create(
                    sandbox=Sandbox(),
                    spec=lambda spec: spec["linux"].update(cgroupsPath=f"{sandbox}/another"),
                )
            with refused(Code.FAILED_PRECONDITION, field="sandbox"):
                await client.update_pod(plain, pids=5)
            with refused(Code.INVALID_ARGUMENT, field="memory_bytes"):
                await client.update_pod(sandbox)
            await client.pause_container(sandbox)
            with refused(Code.FAILED_PRECONDITION):
                await create(pod=where)
            await client.resume_container(sandbox)
            await remove(client, plain)

    asyncio.run(body())


@pytest.mark.parametrize("runtime", ["runc", "crun"])
def test_a_pod_can_have_a_user_namespace(request: pytest.FixtureRequest, rootfs: str, runtime: str) -> None:
    """Shared, with its mappings: what is the pod's belongs to root inside, who may write to it."""
    agent: RunningAgent = request.getfixturevalue("agent" if runtime == "runc" else "crun_agent")
    target = Target(agent.address, rootfs, box="", pace=1.0, execs=1, runtime=runtime)
    before = agent.holdings()

    async def body() -> None:
        async with (
            await connect(target) as client,
            pod(target, client, files=PodFiles.WRITABLE, spec=mapped) as sandbox,
        ):
            own = await said(client, sandbox, "readlink /proc/self/ns/user; echo a >/dev/shm/a")
            one = await start(client, target, pod=PodMember(sandbox, (NETWORK, IPC, USER)))
            script = "readlink /proc/self/ns/user; stat -c %u / /etc/hosts /dev/shm; echo b >>/etc/hosts"
            assert await said(client, one, f"{script}; cat /dev/shm/a") == f"{own}0\n0\n0\na\n"

    asyncio.run(body())
    agent.assert_holds(before)


def test_a_sandbox_that_ends_while_it_is_joined_is_the_reason(slow: Slow) -> None:
    """Nothing is left of the container that was to join it; nor can it be deleted meanwhile."""

    async def body() -> None:
        async with await connect(slow.target) as client, pod(slow.target, client) as sandbox:
            params = creation(slow.target, name("c"), ("true",), pod=PodMember(sandbox))
            (slow.directory / "slow").write_text("create")
            creating = asyncio.create_task(client.create_container(params))
            async with slow.held():
                with pytest.raises(RpcError, match=params.container) as caught:
                    await client.delete_container(sandbox, force=True)
                assert caught.value.code is Code.FAILED_PRECONDITION
                await client.kill_container(sandbox, "KILL")
                await client.wait_container(sandbox)
            with refused(Code.FAILED_PRECONDITION, field="pod.sandbox"):
                await creating
            with refused(Code.NOT_FOUND):
                await client.container_state(params.container)

    asyncio.run(body())


BROKEN = """#!/bin/sh
[ ! -e {directory}/{name} ] || {{ echo "{name}: not today" >&2; exit 32; }}
exec {real} "$@"
"""


@pytest.fixture
def breakable(tmp_path: Path, rootfs: str) -> Iterator[RunningAgent]:
    """One whose mount and umount fail as long as there is a file by their name."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for program in ("mount", "umount"):
        real = shutil.which(program)
        (programs / program).write_text(BROKEN.format(directory=tmp_path, name=program, real=real))
        (programs / program).chmod(0o755)
    path = f"{programs}:{os.environ['PATH']}"
    yield from stopped_clean(RunningAgent("--log-level", "debug", path=path))


def test_a_shm_that_cannot_be_mounted_or_unmounted(
    breakable: RunningAgent, rootfs: str, tmp_path: Path
) -> None:
    """The first leaves nothing; the second leaves a container that says so, and goes once that is solved."""
    target = at(breakable, rootfs)
    before = breakable.holdings()
    params = creation(target, name("pod"), ("true",), sandbox=Sandbox(), overlay=False)

    async def not_made() -> None:
        async with await connect(target) as client:
            with pytest.raises(RpcError, match="mount: not today") as caught:
                await client.create_container(params)
            assert caught.value.code is Code.INTERNAL
            assert await client.list_containers() == ()

    async def not_removed() -> None:
        async with await connect(target) as client:
            await client.create_container(params)
            (tmp_path / "umount").touch()
            with pytest.raises(RpcError, match="umount: not today"):
                await client.delete_container(params.container)
            state = await client.container_state(params.container)
            assert (state.status, "umount: not today" in state.problem) == (Status.FAILED, True)
            (tmp_path / "umount").unlink()
            await client.delete_container(params.container, force=True)

    (tmp_path / "mount").touch()
    asyncio.run(not_made())
    breakable.assert_holds(before)
    (tmp_path / "mount").unlink()
    asyncio.run(not_removed())
    breakable.assert_holds(before)


def test_a_pod_lies_where_its_caller_says(target: Target) -> None:
    """As Kubernetes places one; the pod's cgroup goes with the sandbox."""

    def at_path(path: str) -> Any:
        return lambda spec: spec["linux"].update(cgroupsPath=path)

    async def body() -> None:
        async with (
            await connect(target) as client,
            pod(target, client, spec=at_path("/kubepods/pod1/s"), limits=PodLimits(pids=33)) as sandbox,
            running(target, client, pod=PodMember(sandbox, ())) as one,
            running(target, client, pod=PodMember(sandbox), spec=at_path("/kubepods/pod1/x/two")) as two,
        ):
            paths = [
                (await client.container_state(ident)).cgroup
                for ident in (sandbox, one.container, two.container)
            ]
            root = paths[0].removesuffix("/s")
            assert root.endswith("/kubepods/pod1")
            assert paths == [f"{root}/s", f"{root}/{one.container}", f"{root}/x/two"]
            assert (await client.pod_stats(sandbox)).pids.limit == 33

    asyncio.run(body())


def test_a_created_sandbox_can_be_joined_and_has_its_names_already(target: Target) -> None:
    async def body() -> None:
        async with (
            await connect(target) as client,
            created(target, client, sandbox=Sandbox()) as sandbox,
            running(target, client, pod=PodMember(sandbox.container)) as one,
        ):
            assert await said(client, one.container, "hostname") == f"{sandbox.container}\n"
            await client.delete_container(sandbox.container, force=True)

    asyncio.run(body())


def test_gcsctl_makes_a_pod_and_shows_it(agent: RunningAgent, rootfs: str, tmp_path: Path) -> None:
    before = agent.holdings()
    gcsctl, web, app = Gcsctl(agent.address, rootfs), name("web"), name("app")
    options = ("-d", "--overlay", "--rootfs", rootfs)
    pods: tuple[str, ...] = (
        "--sandbox",
        "--hostname",
        "web",
        "--domainname",
        "example.org",
        "--add-host",
        "db:10.0.0.6",
    )
    pods = (*pods, "--dns", "10.0.0.1", "--shm-size", "1m", "--pod-pids-limit", "50")
    try:
        assert gcsctl("run", "--id", web, *options, *pods, "--", "sleep", "100000").returncode == 0
        started = gcsctl(
            "run", "--id", app, *options, "--pod", web, "--share", "net,uts,ipc", "--", "sleep", "9999"
        )
        assert (started.returncode, started.stderr) == (0, b"")
        script = "cat /etc/hosts /etc/resolv.conf; hostname; df -k --output=size /dev/shm | tail -1"
        inside = gcsctl("exec", app, "--", "sh", "-c", script).stdout.decode()
        assert "127.0.0.1\tweb.example.org web\n10.0.0.6\tdb\nnameserver 10.0.0.1\nweb\n" in inside
        assert inside.split()[-1] == "1024"
        header, *rows = gcsctl("ps").stdout.decode().splitlines()
        assert header.split() == ["CONTAINER", "POD", "STATUS", "PID", "AGE", "COMMAND"]
        assert [row.split()[:2] for row in rows] == [[web, web], [app, web]]
        assert f"{web}, sharing network, uts, ipc" in gcsctl("state", app).stdout.decode()
        assert gcsctl.json("pod", "stats", web)["pids"] == {"current": 2, "limit": 50}
        assert gcsctl.json("pod", "update", "--pids", "60", "--cpus", "0.5", web)["pids"] == 60
        assert gcsctl.json("pod", "stats", web)["pids"]["limit"] == 60
        failed = gcsctl("delete", web)
        assert failed.returncode == 125
        assert app in one_line(failed.stderr)
        assert gcsctl("delete", "--force", web).returncode == 0
        assert gcsctl("ps").stdout.decode().splitlines()[1:] == []
    finally:
        gcsctl("delete", "--force", web)
    agent.assert_holds(before)
    assert not os.path.exists(agent.state_dir / "containers" / web)
