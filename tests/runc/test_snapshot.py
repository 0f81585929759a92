"""An agent is held for a snapshot and goes on: told to, by itself, or by way of successors, with a disk."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from gcsagent.host import snapshot, storage
from gcsagent.host.client import Client
from protocol.errors import Code
from protocol.families.snapshot import ResumeSnapshot
from protocol.families.storage import Device, MountKind, MountStorage
from tests.cases import disks
from tests.cases.agents import RunningAgent, stopped_clean
from tests.cases.storage import tmpfs, unmounted
from tests.cases.target import Target, connect, creation, event, name, raw_call, refused
from tests.runc.test_fault_points import FAULTS, STRIDE, Act, Bench, walk

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def faulty(rootfs: str) -> Iterator[RunningAgent]:
    yield from stopped_clean(RunningAgent("--log-level", "debug", python_path=str(FAULTS)))


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A block device with an empty ext4 file system."""
    image = disks.empty(tmp_path_factory.mktemp("disk") / "image")
    subprocess.run(["mkfs.ext4", "-q", image], check=True, timeout=60)
    made = subprocess.run(["losetup", "-f", "--show", image], check=True, timeout=60, capture_output=True)
    node = made.stdout.decode().strip()
    try:
        yield node
    finally:
        subprocess.run(["losetup", "-d", node], check=True, timeout=60)


def fsfreeze(how: str, target: str) -> None:
    subprocess.run(["fsfreeze", how, target], check=True, timeout=20)


def disk(device: str) -> MountStorage:
    return MountStorage(name("disk"), MountKind.BLOCK, device=Device(path=device))


@contextlib.asynccontextmanager
async def writing(where: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Somebody who makes a file there."""
    process = await asyncio.create_subprocess_exec("touch", f"{where}/{name('file')}")
    try:
        yield process
    finally:
        await asyncio.wait_for(process.wait(), 20)


async def resume(client: Client, what: str) -> tuple[bool, tuple[str, ...]]:
    done = (await snapshot.resume(client, what, machine=False)).done
    return done.held, done.thawed


async def is_free(client: Client) -> bool:
    """Requests are let in, and nothing is frozen."""
    await storage.unmount(client, (await storage.mount(client, tmpfs(name("free")))).mount)
    return not any(each.frozen_ms for each in await storage.list_mounts(client))


@contextlib.contextmanager
def held_for(what: str) -> Iterator[None]:
    with refused(Code.FAILED_PRECONDITION) as caught:
        yield
    assert caught.value.details["snapshot"] == what


def scenario(agent: RunningAgent, rootfs: str) -> Target:
    return Target(agent.address, rootfs, box="", pace=1.0, execs=1)


def test_held_it_lets_nothing_in_and_its_disks_stand_still(
    agent: RunningAgent, rootfs: str, device: str
) -> None:
    async def body() -> None:
        target = scenario(agent, rootfs)
        async with (
            await connect(target) as client,
            unmounted(client),
            await client.events() as events,
        ):
            mount = await storage.mount(client, disk(device))
            also = await storage.mount(client, disk(device))
            held = await snapshot.prepare(client, "one", hold=30.0)
            assert (held.frozen, 25_000 < held.hold_ms <= 30_000) == ((also.mount,), True)
            assert (await event(events, "guest.held", "")).data == {"snapshot": "one", "hold_ms": 30_000}
            async with writing(mount.target) as writer:
                with held_for("one"):
                    await client.create_container(creation(target, name("c"), ("true",)))
                with held_for("one"):
                    await raw_call(target, "archive.put", {"path": "/tmp"})
                with held_for("one"):
                    await snapshot.prepare(client, "other")
                with held_for("one"):
                    await resume(client, "other")
                for machine in (ResumeSnapshot("one", seed=b"x"), ResumeSnapshot("one", offset_ns=0)):
                    with refused(Code.FAILED_PRECONDITION):
                        await client.call("guest.snapshot_resume", machine)
                assert await client.list_containers() == ()
                again = await snapshot.prepare(client, "one", hold=60.0)
                assert (again.frozen, again.hold_ms > 50_000) == (held.frozen, True)
                assert writer.returncode is None
                assert await resume(client, "one") == (True, held.frozen)
            told = await event(events, "guest.resumed", "")
            assert told.data == {"snapshot": "one", "expired": False}
            assert await writer.wait() == 0
            assert await resume(client, "one") == (False, ())
            assert await is_free(client)

    asyncio.run(body())


def test_nobody_resumes_it(agent: RunningAgent, rootfs: str, device: str) -> None:
    """It goes on by itself; what its user has frozen is the user's to thaw."""

    async def body() -> None:
        async with (
            await connect(scenario(agent, rootfs)) as client,
            unmounted(client),
            await client.events() as events,
        ):
            mount = await storage.mount(client, disk(device))
            held = await snapshot.prepare(client, "forgotten", hold=0.5)
            assert held.frozen == (mount.mount,)
            async with writing(mount.target) as writer:
                told = await event(events, "guest.resumed", "")
                assert told.data == {"snapshot": "forgotten", "expired": True}
            assert await writer.wait() == 0
            assert await is_free(client)
            await storage.freeze(client, mount.mount)
            assert (await snapshot.prepare(client, "next")).frozen == ()
            assert await resume(client, "next") == (True, ())
            assert [each.frozen_ms > 0 for each in await storage.list_mounts(client)] == [True]

    asyncio.run(body())


def test_it_waits_for_what_is_under_way(agent: RunningAgent, rootfs: str) -> None:
    async def body() -> None:
        async with await connect(scenario(agent, rootfs)) as client, unmounted(client):
            missing = MountStorage(
                name("disk"), MountKind.BLOCK, device=Device(path="/dev/gcs-nothing"), wait_ms=60_000
            )
            mounting = asyncio.create_task(storage.mount(client, missing))
            while not await storage.list_mounts(client):
                pass
            with refused(Code.FAILED_PRECONDITION) as caught:
                await snapshot.prepare(client, "early", wait=0.1)
            assert caught.value.details["under_way"] == ["storage.mount"]
            assert await is_free(client)
            preparing = asyncio.create_task(snapshot.prepare(client, "late"))
            mounting.cancel()
            assert (await preparing).snapshot == "late"
            assert await resume(client, "late") == (True, ())
            await asyncio.gather(mounting, return_exceptions=True)

    asyncio.run(body())


def test_a_disk_that_cannot_be_frozen(agent: RunningAgent, rootfs: str, device: str) -> None:
    """Somebody else has frozen it: the guest is not held, and it stays frozen."""

    async def body() -> None:
        async with await connect(scenario(agent, rootfs)) as client, unmounted(client):
            mount = await storage.mount(client, disk(device))
            await asyncio.to_thread(fsfreeze, "-f", mount.target)
            with refused(Code.FAILED_PRECONDITION):
                await snapshot.prepare(client, "frozen")
            assert await is_free(client)
            await asyncio.to_thread(fsfreeze, "-u", mount.target)

    asyncio.run(body())


def test_it_ends_though_it_is_held(rootfs: str, device: str, tmp_path: Path) -> None:
    for agent in stopped_clean(RunningAgent("--log-level", "debug")):

        async def body(agent: RunningAgent = agent) -> None:
            async with await connect(scenario(agent, rootfs)) as client:
                mount = await storage.mount(client, disk(device))
                assert (await snapshot.prepare(client, "last")).frozen == (mount.mount,)

        asyncio.run(body())


async def prepare(bench: Bench, arm: Act) -> None:
    device = _device(bench)
    async with unmounted(bench.client):
        mount = await storage.mount(bench.client, disk(device))
        await arm()
        held = await snapshot.prepare(bench.client, "walk")
        assert held.frozen == (mount.mount,)
        with held_for("walk"):
            await storage.mount(bench.client, tmpfs(name("m")))
        async with writing(mount.target) as writer:
            assert [each.frozen_ms > 0 for each in await storage.list_mounts(bench.client)] == [True]
            assert writer.returncode is None
            assert await resume(bench.client, "walk") == (True, held.frozen)
        assert await writer.wait() == 0
        assert await is_free(bench.client)


async def go_on(bench: Bench, arm: Act) -> None:
    device = _device(bench)
    async with unmounted(bench.client), await bench.client.events() as events:
        mount = await storage.mount(bench.client, disk(device))
        await snapshot.prepare(bench.client, "walk")
        async with writing(mount.target) as writer:
            await arm()
            assert await resume(bench.client, "walk") == (True, (mount.mount,))
        assert await writer.wait() == 0
        assert await is_free(bench.client)
        await snapshot.prepare(bench.client, "next")
        told = [await anext(events) for _ in range(3)]
        assert [(each.type, each.data["snapshot"]) for each in told] == [
            ("guest.held", "walk"),
            ("guest.resumed", "walk"),
            ("guest.held", "next"),
        ]
        await resume(bench.client, "next")


def _device(bench: Bench) -> str:
    return (bench.running.directory / "device").read_text()


def test_killed_at_each_step_of_preparing(faulty: RunningAgent, rootfs: str, device: str) -> None:
    (faulty.directory / "device").write_text(device)
    walk(faulty, rootfs, prepare, STRIDE)


def test_killed_at_each_step_of_going_on(faulty: RunningAgent, rootfs: str, device: str) -> None:
    (faulty.directory / "device").write_text(device)
    walk(faulty, rootfs, go_on, STRIDE)
