"""Replugging the vsock device with a fake QEMU and a fake daemon: every way it can go, and what it leaves."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from gcsagent.host.vm import vsockplug
from gcsagent.host.vm.config import VmConfig
from gcsagent.host.vm.errors import ReplugError
from gcsagent.host.vm.inotify import DirectoryWatch
from gcsagent.host.vm.launcher import VirtualMachine
from tests.fakes.vm import FakeHost, fake_host

LONG, SHORT = 20.0, 0.2


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHost]:
    yield from fake_host(monkeypatch)


async def launch(mode: str = "boot", console_log: Path | None = None) -> VirtualMachine:
    words = (f"fake={mode}",)
    return await VirtualMachine.launch(
        VmConfig(cmdline=words, accel="tcg", vsock="vhost-user", console_log=console_log)
    )


async def end(vm: VirtualMachine) -> list[str]:
    """Powers off; what was asked of QEMU, as its console shows."""
    assert (await vm.powerdown()).clean
    return [line.removeprefix("qmp: ").strip() for line in vm.console.lines() if line.startswith("qmp: ")]


async def end_by_daemon(vm: VirtualMachine) -> None:
    """The daemon's death must end the VM."""
    assert vm.daemon_pid is not None
    os.kill(vm.daemon_pid, signal.SIGKILL)
    assert (await vm.wait()).reason == "vhost-device-vsock exited -9: no output"


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_fresh_daemon_behind_the_same_address(host: FakeHost) -> None:
    async def scenario() -> None:
        async with await launch() as vm:
            address, daemon, before = vm.address, vm.daemon_pid, descriptors()
            await vm.replug_vsock()
            assert (vm.address, descriptors()) == (address, before)
            assert vm.daemon_pid != daemon
            assert set(host.processes()) == {vm.pid, vm.daemon_pid}
            assert await end(vm) == [
                "qom-list",
                "device_del vsock",
                # Busy at first.
                "chardev-remove vsock0",
                "chardev-remove vsock0",
                "getfd vsock1",
                "chardev-add vsock1",
                "device_add vsock",
                "left ['vsock1'] []",
            ]

    asyncio.run(scenario())
    assert host.leftovers() == []
    assert host.processes() == []


def test_the_fresh_daemons_death_ends_the_vm_as_the_first_ones_does(host: FakeHost) -> None:
    async def scenario() -> None:
        async with await launch() as vm:
            await vm.replug_vsock()
            await end_by_daemon(vm)

    asyncio.run(scenario())


def test_two_at_once_come_one_after_the_other(host: FakeHost) -> None:
    async def scenario() -> None:
        async with await launch() as vm:
            await asyncio.gather(vm.replug_vsock(), vm.replug_vsock())
            assert set(host.processes()) == {vm.pid, vm.daemon_pid}
            assert (await end(vm))[-1] == "left ['vsock2'] []"

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "mode,timeout,reason",
    [
        ("keeps-device", SHORT, "the guest did not let go of it within 0.2 s"),
        ("refuses-unplug", LONG, "the guest refuses to let go of it"),
    ],
)
def test_a_guest_that_keeps_its_device_keeps_its_daemon(
    host: FakeHost, mode: str, timeout: float, reason: str
) -> None:
    async def scenario() -> None:
        async with await launch(mode) as vm:
            daemon = vm.daemon_pid
            with pytest.raises(ReplugError) as caught:
                await vm.replug_vsock(timeout)
            assert str(caught.value) == f"cannot replug the vsock device: {reason} (it is still plugged)"
            assert caught.value.plugged
            assert vm.daemon_pid == daemon
            await end_by_daemon(vm)

    asyncio.run(scenario())


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vsockplug, "_PATIENCE", 0.1)


@pytest.mark.usefixtures("impatient")
def test_a_hung_daemon_that_holds_up_qemu_is_killed(host: FakeHost) -> None:
    async def scenario() -> None:
        async with await launch("waits-for-daemon") as vm:
            daemon = vm.daemon_pid
            await vm.replug_vsock(LONG)
            assert vm.daemon_pid != daemon
            assert set(host.processes()) == {vm.pid, vm.daemon_pid}
            assert (await end(vm))[-1] == "left ['vsock1'] []"

    asyncio.run(scenario())


@pytest.mark.usefixtures("impatient")
def test_a_hung_daemon_and_a_guest_that_keeps_its_device_end_the_vm(host: FakeHost) -> None:
    async def scenario() -> None:
        async with await launch("waits-for-daemon-in-vain") as vm:
            with pytest.raises(ReplugError, match=r"within 0.4 s \(it is still plugged\)"):
                await vm.replug_vsock(2 * SHORT)
            assert (await vm.wait()).reason == "vhost-device-vsock exited -9: no output"

    asyncio.run(scenario())
    assert host.processes() == []


@pytest.mark.usefixtures("impatient")
def test_a_daemon_that_dies_while_the_guest_keeps_its_device_ends_the_vm(host: FakeHost) -> None:
    async def scenario() -> None:
        async with await launch("keeps-device") as vm:
            assert vm.daemon_pid is not None
            replugging = asyncio.create_task(vm.replug_vsock(SHORT))
            await asyncio.sleep(0)
            os.kill(vm.daemon_pid, signal.SIGKILL)
            with pytest.raises(ReplugError, match="did not let go"):
                await replugging
            assert (await vm.wait()).reason == "vhost-device-vsock exited -9: no output"

    asyncio.run(scenario())


def test_a_daemon_that_does_not_start_leaves_the_vm_to_try_again(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with await launch() as vm:
            before = descriptors()
            monkeypatch.setenv("FAKE_VSOCK", "refuse")
            with pytest.raises(
                ReplugError, match=r"no such thing \(it is unplugged now, try again"
            ) as caught:
                await vm.replug_vsock()
            assert not caught.value.plugged
            assert host.processes() == [vm.pid]
            monkeypatch.setenv("FAKE_VSOCK", "")
            await vm.replug_vsock()
            assert set(host.processes()) == {vm.pid, vm.daemon_pid}
            assert descriptors() == before
            assert (await end(vm))[-1] == "left ['vsock1'] []"

    asyncio.run(scenario())


def test_a_directory_that_cannot_be_used_is_named(host: FakeHost) -> None:
    async def scenario() -> None:
        async with await launch() as vm:
            control = Path(vm.address.split(":")[1]).with_name("vhost-user")
            control.unlink()
            control.mkdir()
            with pytest.raises(ReplugError, match=r"Is a directory: '.*/vhost-user' \(it is unplugged now"):
                await vm.replug_vsock()
            assert vm.daemon_pid is None
            assert host.processes() == [vm.pid]

    asyncio.run(scenario())
    assert host.leftovers() == []


def test_a_device_that_qemu_refuses_is_taken_back_whole(host: FakeHost) -> None:
    async def scenario() -> None:
        async with await launch("adds-second-time") as vm:
            with pytest.raises(ReplugError, match=r"QEMU refused: no such luck \(it is unplugged now"):
                await vm.replug_vsock()
            assert host.processes() == [vm.pid]
            await vm.replug_vsock()
            # The fake asserts that the first attempt's chardev is gone by then.
            assert (await end(vm))[-1] == "left ['vsock2'] []"

    asyncio.run(scenario())


def test_a_chardev_that_qemu_refuses_leaves_no_descriptor_with_it(host: FakeHost) -> None:
    async def scenario() -> None:
        async with await launch("no-chardev") as vm:
            before = descriptors()
            with pytest.raises(ReplugError, match="QEMU refused: no more chardevs"):
                await vm.replug_vsock()
            assert (await end(vm))[-2:] == ["closefd vsock1", "left [] []"]
            # The VM's own are gone by now as well.
            assert descriptors() < before

    asyncio.run(scenario())


def test_a_qemu_that_dies_meanwhile_is_noticed_at_once(host: FakeHost) -> None:
    async def scenario() -> None:
        async with asyncio.timeout(LONG / 2), await launch("dies-unplugging") as vm:
            with pytest.raises(ReplugError, match=r"monitor|VM has ended"):
                await vm.replug_vsock(LONG)
            assert (await vm.wait()).reason == "QEMU exited 1: qemu-system-x86_64: bad slot"

    asyncio.run(scenario())
    assert host.processes() == []


def test_a_caller_that_gives_up_leaves_the_vm_as_it_was(host: FakeHost) -> None:
    async def scenario() -> None:
        async with await launch("keeps-device") as vm:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(SHORT):
                    await vm.replug_vsock(LONG)
            await end_by_daemon(vm)

    asyncio.run(scenario())


def test_destroying_the_vm_ends_a_replug(host: FakeHost, tmp_path: Path) -> None:
    async def scenario() -> None:
        log = tmp_path / "console"
        with DirectoryWatch(tmp_path) as watch:
            vm = await launch("keeps-device", console_log=log)
            replugging = asyncio.create_task(vm.replug_vsock(LONG))
            while b"device_del" not in log.read_bytes():
                await watch.changed()
            vm.destroy()
            with pytest.raises(ReplugError):
                await replugging

    asyncio.run(scenario())
    assert host.leftovers() == []
    assert host.processes() == []
