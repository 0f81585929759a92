"""The launcher against a fake QEMU and a fake vsock daemon: every way a VM can start, end, or not start."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gcsagent.host.vm import accel
from gcsagent.host.vm.config import VmConfig
from gcsagent.host.vm.errors import (
    BootError,
    DiskError,
    Interrupted,
    LaunchError,
    ToolMissing,
    UnsuitableTool,
    VmError,
)
from gcsagent.host.vm.launcher import VirtualMachine
from gcsagent.host.vm.running import run_in_vm
from tests.fakes.vm import FakeHost, fake_host, script


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHost]:
    yield from fake_host(monkeypatch)


def config(mode: str = "boot", **options: Any) -> VmConfig:
    return VmConfig(cmdline=(f"fake={mode}",), accel="tcg", vsock="vhost-user", **options)


def clean(host: FakeHost) -> None:
    assert host.leftovers() == []
    assert host.processes() == []


def test_boot_then_power_button(host: FakeHost) -> None:
    said: list[str] = []

    async def scenario() -> None:
        async with await VirtualMachine.launch(config(port=99), progress=said.append) as vm:
            assert vm.address.startswith(f"hvsock:{host.root}/run/")
            assert vm.address.endswith("/vsock:99")
            assert list(vm.console.stages)[-1] == "ready"
            ended = await vm.powerdown()
        assert (ended.clean, ended.reason, ended.status) == (True, "the guest powered off", 0)
        assert ended.findings == ()

    asyncio.run(scenario())
    assert said[0] == "booting under TCG (asked for), vhost-user-vsock (asked for)"
    assert said[-1] == "guest: ready 9.5"
    clean(host)


def test_a_guest_deaf_to_the_power_button_is_killed(host: FakeHost) -> None:
    async def scenario() -> None:
        async with await VirtualMachine.launch(config("deaf")) as vm:
            ended = await vm.powerdown(timeout=0.3)
        assert (ended.clean, ended.status) == (False, -signal.SIGKILL)
        assert ended.reason == "did not power off within 0.3 s and was killed"

    asyncio.run(scenario())
    clean(host)


def test_leaving_the_context_kills_a_running_vm(host: FakeHost) -> None:
    async def scenario() -> None:
        async with await VirtualMachine.launch(config()) as vm:
            assert set(host.processes()) == {vm.pid, vm.daemon_pid}

    asyncio.run(scenario())
    clean(host)


@pytest.mark.parametrize(
    "mode,stage,reason",
    [
        ("panic", "modules", "Kernel panic - not syncing: sysrq triggered crash"),
        ("fail", "modules", "stage 'disks' failed: no disk named \\x1b[31mrootfs"),
        ("hang", "disks", "not ready within 1 s; last console line: gcs-boot: disks 4.5"),
        (
            "silent",
            "none",
            "not ready within 1 s; --append earlyprintk=ttyS0 shows how far the kernel comes",
        ),
        ("stuck", "none", "the virtual machine stopped (internal-error)"),
    ],
)
def test_a_boot_that_fails_says_where_and_why(host: FakeHost, mode: str, stage: str, reason: str) -> None:
    with pytest.raises(BootError) as caught:
        asyncio.run(VirtualMachine.launch(config(mode, boot_timeout=1.0)))
    error = caught.value
    assert (error.stage, error.reason) == (stage, reason)
    assert error.silent == (mode in ("silent", "stuck"))
    assert "\n" not in str(error)
    assert "\x1b" not in error.report()
    clean(host)


def test_a_panic_shows_the_lines_around_it(host: FakeHost) -> None:
    with pytest.raises(BootError) as caught:
        asyncio.run(VirtualMachine.launch(config("panic")))
    assert caught.value.lines[-2:] == (
        "[    2.05] Kernel panic - not syncing: sysrq triggered crash",
        "[    2.06] Call Trace:",
    )


@pytest.mark.parametrize(
    "mode,reason",
    [
        ("refuse", "QEMU did not start: QEMU exited 1: qemu-system-x86_64: it cannot be done"),
        ("crash", "QEMU did not start: QEMU was killed by SIGABRT: no output"),
    ],
)
def test_a_qemu_that_does_not_start_is_quoted(host: FakeHost, mode: str, reason: str) -> None:
    with pytest.raises(LaunchError) as caught:
        asyncio.run(VirtualMachine.launch(config(mode)))
    assert str(caught.value) == reason
    clean(host)


def test_kvm_that_dies_silently_falls_back_to_tcg_once(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = accel.AccelChoice("kvm", "a vcpu can be created", may_fall_back=True)
    monkeypatch.setattr(accel, "choose", lambda request: choice)

    async def scenario() -> None:
        async with await VirtualMachine.launch(config("kvm-dies")) as vm:
            assert vm.accel.name == "tcg"
            assert vm.accel.reason == (
                "KVM guest died before its first output: QEMU did not start: QEMU exited 1: "
                "qemu-system-x86_64: it cannot be done"
            )

    asyncio.run(scenario())
    clean(host)


def test_a_qemu_that_aborts_before_the_guest_runs_is_started_once_more(
    host: FakeHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_ABORTED", str(tmp_path / "aborted"))
    said: list[str] = []

    async def scenario() -> None:
        async with await VirtualMachine.launch(config("aborts-once"), progress=said.append) as vm:
            assert list(vm.console.stages)[-1] == "ready"

    asyncio.run(scenario())
    assert sum(line.startswith("booting") for line in said) == 2
    assert said[1].startswith("QEMU was killed by SIGABRT: physmem.c:2678: iotlb_to_section")
    assert said[1].endswith("; once more")
    clean(host)


def test_one_that_aborts_each_time_is_given_up(
    host: FakeHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_ABORTED", str(tmp_path / "aborted"))
    said: list[str] = []
    with pytest.raises(BootError, match="QEMU was killed by SIGABRT"):
        asyncio.run(VirtualMachine.launch(config("aborts"), progress=said.append))
    assert sum(line.startswith("booting") for line in said) == 2
    clean(host)


def test_kvm_guest_that_has_spoken_is_not_started_again(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = accel.AccelChoice("kvm", "a vcpu can be created", may_fall_back=True)
    monkeypatch.setattr(accel, "choose", lambda request: choice)
    said: list[str] = []
    with pytest.raises(BootError):
        asyncio.run(VirtualMachine.launch(config("panic"), progress=said.append))
    assert sum(line.startswith("booting") for line in said) == 1


def test_a_daemon_that_does_not_start_is_quoted(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_VSOCK", "refuse")
    with pytest.raises(
        LaunchError, match=r"^vhost-device-vsock exited 1: vhost-device-vsock: no such thing$"
    ):
        asyncio.run(VirtualMachine.launch(config()))
    clean(host)


def test_the_daemons_death_ends_the_vm(host: FakeHost) -> None:
    async def scenario() -> None:
        async with await VirtualMachine.launch(config()) as vm:
            assert vm.daemon_pid is not None
            os.kill(vm.daemon_pid, signal.SIGKILL)
            ended = await vm.wait()
        assert not ended.clean
        assert ended.reason == "vhost-device-vsock exited -9: no output"

    asyncio.run(scenario())
    clean(host)


def test_cancelling_the_launch_leaves_nothing(host: FakeHost) -> None:
    async def scenario() -> None:
        booting = asyncio.Event()
        launch = asyncio.create_task(
            VirtualMachine.launch(
                config("hang"), progress=lambda text: booting.set() if "disks" in text else None
            )
        )
        await booting.wait()
        assert len(host.processes()) == 2
        launch.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await launch
        clean(host)

    asyncio.run(scenario())


def test_sigterm_while_in_use_removes_the_vm(host: FakeHost) -> None:
    async def body(vm: VirtualMachine) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.Event().wait()

    with pytest.raises(Interrupted, match="ended by SIGTERM"):
        asyncio.run(run_in_vm(config(), body, progress=lambda text: None))
    clean(host)


def test_run_in_vm_gives_the_bodys_result_and_powers_off(host: FakeHost) -> None:
    async def body(vm: VirtualMachine) -> int:
        return 7

    assert asyncio.run(run_in_vm(config(), body, progress=lambda text: None)) == 7
    clean(host)


def test_a_vm_that_ends_while_in_use_cancels_the_body(host: FakeHost) -> None:
    cancelled: list[bool] = []

    async def body(vm: VirtualMachine) -> None:
        os.kill(vm.pid, signal.SIGUSR1)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    with pytest.raises(VmError, match=r"^the VM ended while in use: the guest rebooted, which ends a VM$"):
        asyncio.run(run_in_vm(config("reset-later"), body, progress=lambda text: None))
    assert cancelled == [True]
    clean(host)


def test_a_body_that_fails_in_a_living_vm_keeps_its_error(host: FakeHost) -> None:
    async def body(vm: VirtualMachine) -> None:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        asyncio.run(run_in_vm(config(), body, progress=lambda text: None))
    clean(host)


def test_the_console_log_holds_the_raw_console(host: FakeHost) -> None:
    log = host.root / "console.log"

    async def scenario() -> None:
        async with await VirtualMachine.launch(config(console_log=log)) as vm:
            await vm.powerdown()

    asyncio.run(scenario())
    assert log.read_bytes().startswith(b"gcs-boot: kernel 0.5\r\n")
    assert log.read_bytes().endswith(b"reboot: Power down\n")


def test_an_old_qemu_is_refused_under_tcg(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    old = script(host.root / "old", 'echo "QEMU emulator version 7.2.22 (Debian)"')
    monkeypatch.setenv("GCS_QEMU", str(old))
    with pytest.raises(UnsuitableTool, match=r"QEMU 7\.2\.22 at .* corrupts guests under TCG .*make tools"):
        asyncio.run(VirtualMachine.launch(config()))
    clean(host)


def test_a_missing_image_names_the_script_that_makes_it(host: FakeHost) -> None:
    (host.root / "image" / "initramfs").unlink()
    with pytest.raises(ToolMissing, match=r"initramfs is missing; run scripts/build-rootfs\.sh"):
        asyncio.run(VirtualMachine.launch(config()))


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("vmlinuz", b"", "is no Linux kernel for x86 (bzImage or vmlinux)"),
        ("vmlinuz", b"ELF" * 1000, "is no Linux kernel for x86 (bzImage or vmlinux)"),
        ("initramfs", b"", "is no initramfs: neither a cpio archive nor a compressed one"),
        ("initramfs", b"hsqs" + bytes(100), "is no initramfs: neither a cpio archive nor a compressed one"),
    ],
)
def test_an_image_of_something_else_is_refused_before_anything_starts(
    host: FakeHost, name: str, content: bytes, said: str
) -> None:
    path = host.root / "image" / name
    path.write_bytes(content)
    with pytest.raises(UnsuitableTool) as caught:
        asyncio.run(VirtualMachine.launch(config()))
    assert str(caught.value) == f"{path} {said}"
    clean(host)


def test_a_failing_mkfs_is_quoted(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    mkfs = script(host.root / "mkfs", "echo hello; echo 'mkfs: no space' >&2; exit 3")
    monkeypatch.setenv("GCS_MKFS_EROFS", str(mkfs))
    with pytest.raises(DiskError, match=r"^mkfs.erofs of .* exited 3: mkfs: no space$"):
        asyncio.run(VirtualMachine.launch(config(rootfs=host.root)))
    clean(host)


def test_a_missing_rootfs_is_named(host: FakeHost) -> None:
    with pytest.raises(DiskError, match=r"^root file system /nonexistent: No such file or directory$"):
        asyncio.run(VirtualMachine.launch(config(rootfs=Path("/nonexistent"))))
    clean(host)


def test_directories_of_dead_launchers_are_swept(host: FakeHost) -> None:
    abandoned = host.root / "run" / "gcs-vm-dead"
    abandoned.mkdir()
    (abandoned / "lock").touch()

    async def scenario() -> None:
        async with await VirtualMachine.launch(config()):
            assert not abandoned.exists()
            assert len(host.leftovers()) == 1
            # A second one must leave the first one's directory alone.
            async with await VirtualMachine.launch(config()):
                assert len(host.leftovers()) == 2

    asyncio.run(scenario())
    clean(host)
