"""Replugging the vsock device with a fake QEMU and a fake daemon: every way it can go, and what it leaves."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest

from gcsagent.host.dialogue import greet
from gcsagent.host.vm import guest, vsockdev, vsockplug
from gcsagent.host.vm.config import VmConfig
from gcsagent.host.vm.errors import ReplugError
from gcsagent.host.vm.inotify import DirectoryWatch
from gcsagent.host.vm.launcher import VirtualMachine
from gcsagent.host.vm.qmp import QmpClient
from protocol.address import parse_dial
from tests.cases.descriptors import descriptors, settled_descriptors
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


async def answers(vm: VirtualMachine) -> None:
    dialogue, _ = await greet(parse_dial(vm.address), timeout=LONG, client_name="tests")
    dialogue.close()


def test_a_fresh_daemon_behind_the_same_address(host: FakeHost) -> None:
    async def scenario() -> None:
        async with await launch() as vm:
            await answers(vm)
            address, daemon, before = vm.address, vm.daemon_pid, len(settled_descriptors())
            await vm.replug_vsock()
            await answers(vm)
            assert (vm.address, len(descriptors())) == (address, before)
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


def test_hosts_may_dial_as_soon_as_the_guests_driver_runs(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Who dials before may have the daemon serve nobody any more."""
    driver = tmp_path / "driver"
    driver.touch()
    monkeypatch.setenv("FAKE_DRIVER", str(driver))
    asked: list[str] = []

    async def scenario() -> None:
        async with await launch("slow-driver") as vm:
            path = Path(vm.address.split(":")[1])
            driver.unlink()
            await vm.replug_vsock()
            execute = vm.monitor.execute

            async def counted(command: str, *args: Any, **more: Any) -> Any:
                assert not path.exists()
                asked.append(command)
                if len(asked) == 3:
                    driver.touch()
                return await execute(command, *args, **more)

            monkeypatch.setattr(vm.monitor, "execute", counted)
            with DirectoryWatch(path.parent) as watch:
                while not path.exists():
                    await watch.changed()

    asyncio.run(scenario())
    assert asked == ["x-query-virtio-status"] * 4


def test_where_qemu_cannot_tell_hosts_may_dial_at_once(host: FakeHost) -> None:
    async def scenario() -> None:
        async with await launch("cannot-tell") as vm:
            await vm.replug_vsock()
            await answers(vm)

    asyncio.run(scenario())


def test_of_the_kernels_device_qemu_is_not_asked(tmp_path: Path) -> None:
    """Nobody can dial too early there."""
    qmp = create_autospec(QmpClient, instance=True)

    async def scenario() -> None:
        choice = vsockdev.VsockChoice("vhost-vsock", "asked for")
        device = vsockdev.VsockDevice(choice, "vsock:4711", 4711, tmp_path)
        await vsockplug.VsockPlug(qmp, device).publish()

    asyncio.run(scenario())
    assert qmp.mock_calls == []


@pytest.fixture
def mends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest, "_MEND_SECONDS", 0.01)
    monkeypatch.setattr(guest, "_MEND_UNPLUG_SECONDS", SHORT)


@contextlib.asynccontextmanager
async def replugging(vm: VirtualMachine) -> AsyncIterator[None]:
    """Is over when the VM has been replugged, or could not be."""
    replugged = asyncio.Event()
    vm.guest.on_vsock_changed = replugged.set
    yield
    async with asyncio.timeout(LONG):
        await replugged.wait()


def lose_worker(vm: VirtualMachine, signum: int = signal.SIGUSR2) -> None:
    """Its daemon lives on and serves nobody."""
    assert vm.daemon_pid is not None
    os.kill(vm.daemon_pid, signum)


@pytest.fixture(params=["thread-pidfd", "before-linux-6.9"])
def any_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "before-linux-6.9":
        monkeypatch.setattr(vsockdev, "_PIDFD_THREAD", 1 << 30)


@pytest.mark.usefixtures("mends_at_once", "any_kernel")
def test_a_daemon_that_panics_is_replaced(host: FakeHost, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with await launch() as vm:
            daemons = {vm.daemon_pid}
            for _ in range(2):
                await answers(vm)
                async with replugging(vm):
                    lose_worker(vm, signal.SIGUSR1)
                daemons.add(vm.daemon_pid)
            await answers(vm)
            assert len(daemons) == 3
            assert set(host.processes()) == {vm.pid, vm.daemon_pid}

    asyncio.run(scenario())
    said = "called `Result::unwrap()` on an `Err` value: Os { code: 32, kind: BrokenPipe }"
    assert [record.message for record in caplog.records] == [
        f"vhost-device-vsock serves nobody any more ({said}) and is replaced"
    ] * 2


@pytest.mark.usefixtures("mends_at_once")
def test_a_daemon_that_serves_nobody_any_more_without_a_word_is_replaced(host: FakeHost) -> None:
    async def scenario() -> None:
        async with await launch() as vm:
            await answers(vm)
            async with replugging(vm):
                lose_worker(vm)
            await answers(vm)

    asyncio.run(scenario())
    assert host.processes() == []


@pytest.mark.usefixtures("mends_at_once", "any_kernel")
def test_of_a_vm_that_is_paused_it_is_replaced_once_that_goes_on(host: FakeHost) -> None:
    async def scenario() -> None:
        async with await launch() as vm:
            await answers(vm)
            await vm.pause()
            lost = Path(vm.address.split(":")[1]).with_name("lost")
            async with replugging(vm):
                with DirectoryWatch(lost.parent) as watch:
                    lose_worker(vm)
                    while not lost.exists():
                        await watch.changed()
                await vm.resume()
            await answers(vm)
            asked = await end(vm)
            assert asked.index("stop") < asked.index("cont") < asked.index("device_del vsock")

    asyncio.run(scenario())


@pytest.mark.usefixtures("mends_at_once")
def test_one_that_cannot_be_replaced_is_told_and_kept(
    host: FakeHost, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with await launch("keeps-device") as vm:
            await answers(vm)
            daemon = vm.daemon_pid
            async with replugging(vm):
                lose_worker(vm)
            assert vm.daemon_pid == daemon
            # What is told comes in the turn of the loop that it has waited for.
            await vm.monitor.execute("qom-list", {"path": "/machine/peripheral"})

    asyncio.run(scenario())
    assert caplog.records[1].message == (
        "the guest is out of reach: cannot replug the vsock device:"
        " the guest did not let go of it within 0.2 s (it is still plugged)"
    )


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
            await answers(vm)
            before = len(settled_descriptors())
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
            await answers(vm)
            assert len(descriptors()) == before
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
            before = len(settled_descriptors())
            with pytest.raises(ReplugError, match="QEMU refused: no more chardevs"):
                await vm.replug_vsock()
            assert (await end(vm))[-2:] == ["closefd vsock1", "left [] []"]
            # The VM's own are gone by now as well.
            assert len(descriptors()) < before

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
