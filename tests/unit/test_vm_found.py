"""Named VMs found again by another process: told of their end, and not taken for one of the same name."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from gcsagent.host.vm import starter
from gcsagent.host.vm.config import VmConfig
from gcsagent.host.vm.errors import VmNotFound, VmNotRunning
from gcsagent.host.vm.found import FoundVm
from gcsagent.host.vm.named import VmStore
from gcsagent.host.vm.share import Share
from gcsagent.host.vm.shareplug import PluggedShare
from tests.fakes.vm import FakeHost, fake_host_of_named


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHost]:
    yield from fake_host_of_named(monkeypatch)


async def started(name: str = "web", mode: str = "boot") -> FoundVm:
    config = VmConfig(cmdline=(f"fake={mode}",), accel="tcg", vsock="vhost-user")
    record = await starter.start(VmStore(), name, config, progress=lambda text: None)
    found = FoundVm.named(name)
    assert (found.record, found.address) == (record, record.address)
    return found


async def waiting(vm: FoundVm) -> asyncio.Task[str | None]:
    task = asyncio.create_task(vm.wait())
    await asyncio.sleep(0)
    return task


@pytest.mark.parametrize(
    "killed, reason",
    [("qemu_pid", "QEMU was killed by SIGKILL"), ("keeper_pid", "its keeper process was killed")],
)
def test_whoever_waits_is_told_why_it_crashed(host: FakeHost, killed: str, reason: str) -> None:
    async def body() -> None:
        vm = await started()
        first, second = await waiting(vm), await waiting(FoundVm.named("web"))
        os.kill(getattr(vm.record, killed), signal.SIGKILL)
        async with asyncio.timeout(20):
            for told in (await first, await second, await vm.wait()):
                assert told is not None
                assert told.startswith(reason)
        with pytest.raises(VmNotRunning):
            FoundVm.named("web")

    asyncio.run(body())


def test_an_end_in_order_has_no_reason(host: FakeHost) -> None:
    async def body() -> None:
        with pytest.raises(VmNotFound):
            FoundVm.named("web")
        vm = await started(mode="reset-later")
        told = await waiting(vm)
        assert vm.record.qemu_pid is not None
        os.kill(vm.record.qemu_pid, signal.SIGUSR1)
        async with asyncio.timeout(20):
            assert await told is None
            assert await vm.wait() is None

    asyncio.run(body())


def test_another_vm_of_the_same_name_is_left_alone(host: FakeHost) -> None:
    async def body() -> None:
        first = await started()
        os.kill(first.record.keeper_pid, signal.SIGKILL)
        async with asyncio.timeout(20):
            await first.wait()
        second = await started()
        with pytest.raises(VmNotRunning, match="another one has its name"):
            await first.plug_share(Share(host.root, "src"))
        with pytest.raises(VmNotRunning, match="another one has its name"):
            await first.unplug_disk("data")
        assert await first.wait() is None
        assert await second.shares() == []

    asyncio.run(body())


def test_shares_come_and_go(host: FakeHost, tmp_path: Path) -> None:
    async def body() -> None:
        vm = await started()
        await vm.plug_share(Share(tmp_path, "src", read_only=True))
        assert await vm.shares() == [PluggedShare("src", str(tmp_path), True, True)]
        await vm.unplug_share("src")
        assert await vm.shares() == []

    asyncio.run(body())
