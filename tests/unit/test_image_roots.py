"""An image's disk in a VM: plugged in when first wanted, kept while it is used, gone with the last.

A scripted monitor is in QEMU's place, a scripted agent in the guest's.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from gcsagent.host.cli import image_roots
from gcsagent.host.client import Client
from gcsagent.host.errors import ConnectionBroken
from gcsagent.host.image.cache import Entry, Form
from gcsagent.host.image.documents import Config
from gcsagent.host.vm.named import NamedVm, VmStore, boot_id, write_record
from gcsagent.host.vm.process import start_time
from protocol.errors import Code, RpcError
from protocol.families.storage import (
    ListMounts,
    MountKind,
    MountList,
    MountState,
    MountStatus,
    MountStorage,
    Unmounted,
    UnmountStorage,
)
from tests.fakes.fake_agent import FakeAgent
from tests.unit.test_vm_diskplug import Monitor

SECONDS = 20.0
CONFIG = Config("amd64", "linux", ())
SERIAL = "image-" + "a" * 14
OTHER = "image-" + "b" * 14


class Guest:
    """The agent's mounts, and those of them that containers use."""

    def __init__(self, agent: FakeAgent) -> None:
        self.mounts: dict[str, MountState] = {}
        self.used: set[str] = set()
        self.problem: Code | None = None
        agent.handlers["storage.list"] = self.list
        agent.handlers["storage.mount"] = self.mount
        agent.handlers["storage.unmount"] = self.unmount

    def list(self, _params: ListMounts) -> MountList:
        return MountList(tuple(self.mounts.values()))

    def mount(self, params: MountStorage) -> MountState:
        if self.problem is not None:
            raise RpcError(self.problem, "no")
        assert params.device is not None
        assert (params.device.serial, params.read_only) == (params.mount, True)
        state = MountState(params.mount, MountKind.BLOCK, MountStatus.MOUNTED, f"/mounts/{params.mount}")
        return self.mounts.setdefault(params.mount, state)

    def unmount(self, params: UnmountStorage) -> Unmounted:
        if self.problem is not None:
            raise RpcError(self.problem, "no")
        if params.mount in self.used:
            raise RpcError(Code.FAILED_PRECONDITION, "a container uses it")
        del self.mounts[params.mount]
        return Unmounted((params.mount,))


Body = Callable[[Monitor, Guest, Client], Awaitable[None]]


@pytest.fixture
def in_vm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Body], None]:
    """Runs it with a VM ``dev`` whose keeper is this process."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    directory = VmStore().directory("dev")
    directory.mkdir(parents=True)
    pid, started = os.getpid(), start_time(os.getpid())
    assert started is not None
    address = f"unix:{tmp_path}/agent"
    qmp = str(tmp_path / "qmp")
    vm = NamedVm("dev", "running", pid, started, boot_id(), 0.0, "", qmp, 64, 1, address=address)
    write_record(directory, vm)

    def run(body: Body) -> None:
        async def scenario() -> None:
            monitor = Monitor()
            async with (
                await asyncio.start_unix_server(monitor.serve, qmp),
                FakeAgent(tmp_path / "agent") as agent,
                asyncio.timeout(SECONDS),
            ):
                guest = Guest(agent)
                async with await Client.connect(address) as client:
                    await body(monitor, guest, client)

        asyncio.run(scenario())

    return run


def image(letter: str = "a") -> tuple[Entry, Path]:
    return Entry(f"sha256:{letter * 64}", (), CONFIG, 1, (Form.DISK,)), Path(__file__)


ARGS = argparse.Namespace(vm="dev")


def plugged(monitor: Monitor) -> list[str]:
    return [device.removeprefix("disk-") for device in monitor.ports.values() if device]


def test_an_image_comes_with_its_first_container_and_goes_with_the_last(
    in_vm: Callable[[Body], None],
) -> None:
    async def body(monitor: Monitor, guest: Guest, client: Client) -> None:
        async with image_roots.rooted(ARGS, client, image()) as root:
            assert root is not None
            assert (root.path, plugged(monitor)) == (f"/mounts/{SERIAL}", [SERIAL])
            guest.used.add(SERIAL)
            root.settled()
            async with image_roots.rooted(ARGS, client, image()) as again:
                assert again is not None
                assert again.path == root.path
            assert plugged(monitor) == [SERIAL]
        assert (plugged(monitor), list(guest.mounts)) == ([SERIAL], [SERIAL])
        assert monitor.asked.count("device_add") == 1
        guest.used.clear()
        await image_roots.release("dev", client)
        assert (plugged(monitor), list(guest.mounts)) == ([], [])
        assert list(monitor.nodes) == ["disk-rootfs"]

    in_vm(body)


def test_only_what_nobody_uses_goes_and_only_images(in_vm: Callable[[Body], None]) -> None:
    async def body(monitor: Monitor, guest: Guest, client: Client) -> None:
        async with image_roots.rooted(ARGS, client, image()):
            guest.used.add(SERIAL)
        data = MountState("data", MountKind.BLOCK, MountStatus.MOUNTED, "/mounts/data")
        guest.mounts["data"] = data
        async with image_roots.rooted(ARGS, client, image("b")):
            assert sorted(plugged(monitor)) == [SERIAL, OTHER]
        assert (plugged(monitor), sorted(guest.mounts)) == ([SERIAL], ["data", SERIAL])

    in_vm(body)


def test_what_cannot_be_mounted_is_unplugged_again(in_vm: Callable[[Body], None]) -> None:
    async def body(monitor: Monitor, guest: Guest, client: Client) -> None:
        guest.problem = Code.NOT_FOUND
        with pytest.raises(RpcError) as caught:
            async with image_roots.rooted(ARGS, client, image()):
                raise AssertionError
        assert (caught.value.code, plugged(monitor)) == (Code.NOT_FOUND, [])

    in_vm(body)


def test_a_container_that_cannot_be_made_leaves_no_disk(in_vm: Callable[[Body], None]) -> None:
    async def body(monitor: Monitor, guest: Guest, client: Client) -> None:
        with pytest.raises(RpcError):
            async with image_roots.rooted(ARGS, client, image()):
                raise RpcError(Code.INVALID_ARGUMENT, "no such user")
        assert (plugged(monitor), list(guest.mounts)) == ([], [])

    in_vm(body)


def test_what_cannot_be_released_is_said_and_stays(
    in_vm: Callable[[Body], None], capsys: pytest.CaptureFixture[str]
) -> None:
    async def body(monitor: Monitor, guest: Guest, client: Client) -> None:
        async with image_roots.rooted(ARGS, client, image()):
            guest.problem = Code.INTERNAL
        guest.problem = None
        assert plugged(monitor) == [SERIAL]
        await image_roots.release("dev", client)
        assert plugged(monitor) == []

    in_vm(body)
    assert "stays in the VM" in capsys.readouterr().err


def test_a_vm_that_is_gone_is_not_asked_again(
    in_vm: Callable[[Body], None], capsys: pytest.CaptureFixture[str]
) -> None:
    async def body(monitor: Monitor, guest: Guest, client: Client) -> None:
        with pytest.raises(ConnectionBroken):
            async with image_roots.rooted(ARGS, client, image()):
                raise ConnectionBroken("gone")
        assert plugged(monitor) == [SERIAL]

    in_vm(body)
    assert capsys.readouterr().err == ""


def test_others_wait_until_the_container_is_known(in_vm: Callable[[Body], None]) -> None:
    """Else one that ends its own could unmount what was mounted for the next, before anybody uses it."""

    async def body(monitor: Monitor, guest: Guest, client: Client) -> None:
        async with image_roots.rooted(ARGS, client, image()) as root:
            assert root is not None
            releasing = asyncio.create_task(image_roots.release("dev", client))
            assert await asyncio.wait([releasing], timeout=0.3) == (set(), {releasing})
            assert list(guest.mounts) == [SERIAL]
            guest.used.add(SERIAL)
            root.settled()
            await releasing
            assert plugged(monitor) == [SERIAL]

    in_vm(body)
