"""Named VMs through the commands a person types, with a real keeper process around a fake QEMU."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gcsagent.host.cli import parser
from gcsagent.host.vm import control, starter
from gcsagent.host.vm.config import VmConfig
from gcsagent.host.vm.errors import (
    BootError,
    InvalidVmConfig,
    ToolMissing,
    VmError,
    VmExists,
    VmNotFound,
    VmNotRunning,
)
from gcsagent.host.vm.named import VmStore, read_record, write_record
from gcsagent.host.vm.places import state_dir
from gcsagent.host.vm.process import start_time
from tests.cases.agents import eventually
from tests.fakes.vm import FakeHost, end_of, fake_host_of_named


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHost]:
    yield from fake_host_of_named(monkeypatch)


def vm(*words: str) -> int:
    """Runs `gcsctl vm WORDS`."""
    args = parser.parse(["vm", *words])
    code = asyncio.run(args.handler(args))
    assert isinstance(code, int)
    return code


def start(name: str, mode: str = "boot", *options: str) -> int:
    return vm("start", name, "--accel", "tcg", "--vsock", "vhost-user", "--append", f"fake={mode}", *options)


def test_start_list_console_stop(host: FakeHost, capsys: pytest.CaptureFixture[str]) -> None:
    assert start("web", "boot", "--memory", "256", "--cpus", "1") == 0
    shown = capsys.readouterr()
    address = shown.out.strip()
    assert address.startswith(f"hvsock:{host.root}/run/gcs-vm-")
    assert "guest: ready 9.5" in shown.err
    assert VmStore().address("web") == address

    assert vm("ls", "--json") == 0
    (listed,) = json.loads(capsys.readouterr().out)
    assert (listed["name"], listed["state"], listed["address"]) == ("web", "running", address)
    assert (listed["memory_mib"], listed["cpus"], listed["accel"]) == (256, 1, "TCG (asked for)")
    assert set(host.processes()) == {listed["qemu_pid"], listed["daemon_pid"], listed["keeper_pid"]}

    assert vm("ls") == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["NAME", "STATE", "PID", "AGE", "ACCEL", "ADDRESS"]
    assert row.split()[:3] == ["web", "running", str(listed["qemu_pid"])]

    assert vm("console", "web") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "gcs-boot: ready 9.5"

    assert vm("stop", "web") == 0
    assert host.leftovers() == []
    assert host.processes() == []
    assert vm("ls") == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_a_name_is_taken_once(host: FakeHost) -> None:
    start("web")
    with pytest.raises(VmExists, match=r"^VM 'web' is already running \(keeper process \d+\); stop it"):
        start("web")
    assert VmStore().get("web").state == "running"


def test_two_names_run_side_by_side(host: FakeHost) -> None:
    start("a")
    start("b")
    assert [vm.name for vm in VmStore().list()] == ["a", "b"]
    vm("stop", "a")
    assert VmStore().get("b").state == "running"
    assert VmStore().address("b")


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "-x", "x" * 64, "a b"])
def test_impossible_names_are_refused(host: FakeHost, name: str) -> None:
    with pytest.raises(InvalidVmConfig, match="VM name"):
        VmStore().get(name)


@pytest.mark.parametrize("command", [("stop",), ("console",), ("console", "-f")])
def test_unknown_names_are_told_apart(host: FakeHost, command: tuple[str, ...]) -> None:
    with pytest.raises(VmNotFound, match=r"no VM named 'web'; `gcsctl vm ls` lists them"):
        vm(*command, "web")


def test_a_failed_boot_is_told_and_leaves_nothing(host: FakeHost) -> None:
    with pytest.raises(BootError) as caught:
        start("web", "panic")
    assert caught.value.stage == "modules"
    assert caught.value.reason == "Kernel panic - not syncing: sysrq triggered crash"
    assert "Call Trace:" in caught.value.report()
    assert host.leftovers() == []
    assert host.processes() == []


def test_errors_before_the_boot_keep_their_type(host: FakeHost) -> None:
    (host.root / "image" / "vmlinuz").unlink()
    with pytest.raises(ToolMissing, match="vmlinuz is missing"):
        start("web")
    assert host.leftovers() == []


def test_a_forwarded_port_that_is_taken_is_told_before_the_boot(
    host: FakeHost, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        reason = rf"^cannot listen on 127\.0\.0\.1:{port}: Address already in use$"
        with pytest.raises(VmError, match=reason):
            start("web", "boot", "--forward", f"{host.root}/s:web:80", "--forward", f"{port}:web:80")
    assert capsys.readouterr().err == "", "nothing was booted"
    assert not (host.root / "s").exists()
    assert host.leftovers() == []
    assert host.processes() == []


def test_sigterm_while_starting_leaves_nothing(host: FakeHost) -> None:
    progress, said = os.pipe()
    process = os.fork()
    if process == 0:
        sys.stderr = os.fdopen(said, "w")
        try:
            start("web", "hang")
        except VmError as error:
            os._exit(7 if str(error) == "ended by SIGTERM" else 1)
        os._exit(1)
    os.close(said)
    with open(progress, encoding="utf-8") as lines:
        assert any(line.startswith("guest: disks") for line in lines)
        os.kill(process, signal.SIGTERM)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 7
    assert host.leftovers() == []
    assert host.processes() == []


def test_a_start_is_told_that_somebody_has_stopped_its_vm(host: FakeHost) -> None:
    told, tell = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            start("web", "hang")
        except VmError as error:
            os.write(tell, str(error).encode())
        os._exit(0)
    os.close(tell)
    assert eventually(lambda: [each.state for each in VmStore().list()]) == ["starting"]
    vm("stop", "web")
    with open(told, encoding="utf-8") as words:
        assert words.read() == "it was stopped before it was ready"
    os.waitpid(process, 0)
    assert host.leftovers() == []
    assert host.processes() == []


def test_a_crashed_vm_keeps_its_console_until_it_is_stopped(
    host: FakeHost, capsys: pytest.CaptureFixture[str]
) -> None:
    start("web")
    record = VmStore().get("web")
    assert record.qemu_pid is not None
    os.kill(record.qemu_pid, signal.SIGKILL)
    assert end_of(record.keeper_pid)
    crashed = VmStore().get("web")
    assert (crashed.state, crashed.reason) == (
        "crashed",
        "QEMU was killed by SIGKILL: by somebody, or by this host for want of memory: its kernel log says so",
    )
    with pytest.raises(VmNotRunning, match="VM 'web' is not running: QEMU was killed by SIGKILL"):
        VmStore().address("web")
    assert host.processes() == []
    capsys.readouterr()
    vm("console", "-f", "web")
    assert "gcs-boot: ready 9.5" in capsys.readouterr().out
    vm("stop", "web")
    assert host.leftovers() == []


def test_of_a_fresh_vsock_daemon_its_record_tells(host: FakeHost) -> None:
    start("web")
    before = VmStore().get("web")
    assert before.daemon_pid is not None
    os.kill(before.daemon_pid, signal.SIGUSR2)  # it serves nobody any more
    assert eventually(lambda: VmStore().get("web").daemon_pid != before.daemon_pid)
    after = VmStore().get("web")
    assert (after.address, after.qemu_pid, after.state) == (before.address, before.qemu_pid, "running")
    assert set(host.processes()) == {after.qemu_pid, after.daemon_pid, after.keeper_pid}
    vm("stop", "web")
    assert host.leftovers() == []


def test_a_killed_keeper_takes_the_vm_along_and_the_name_is_free(host: FakeHost) -> None:
    start("web")
    record = VmStore().get("web")
    assert record.qemu_pid is not None
    assert record.daemon_pid is not None
    os.kill(record.keeper_pid, signal.SIGKILL)
    for pid in (record.keeper_pid, record.qemu_pid, record.daemon_pid):
        assert end_of(pid)
    stale = VmStore().get("web")
    assert (stale.state, stale.reason) == ("crashed", "its keeper process was killed")
    start("web")
    assert VmStore().get("web").state == "running"
    os.kill(VmStore().get("web").keeper_pid, signal.SIGKILL)
    vm("stop", "web")
    assert host.leftovers() == []


def test_a_reused_pid_is_not_mistaken_for_the_keeper(host: FakeHost) -> None:
    start("web")
    directory = VmStore().directory("web")
    record = VmStore().get("web")
    for lie in ({"keeper_started": record.keeper_started + 1}, {"boot_id": "another boot"}):
        write_record(directory, dataclasses.replace(record, **lie))
        changed = read_record(directory)
        assert changed is not None
        assert changed.state == "crashed"
    write_record(directory, record)
    assert VmStore().get("web").state == "running"


def test_a_guest_that_powers_off_takes_its_name_along(host: FakeHost) -> None:
    config = VmConfig(cmdline=("fake=reset-later",), accel="tcg", vsock="vhost-user")
    record = asyncio.run(starter.start(VmStore(), "web", config, progress=lambda text: None))
    assert record.state == "running"
    assert record.qemu_pid is not None
    os.kill(record.qemu_pid, signal.SIGUSR1)
    assert end_of(record.keeper_pid)
    assert VmStore().list() == []
    assert host.leftovers() == []
    assert host.processes() == []


def test_stop_kills_a_guest_that_is_deaf(host: FakeHost) -> None:
    start("web", "deaf")
    assert vm("stop", "--timeout", "0.2", "web") == 0
    assert host.leftovers() == []
    assert host.processes() == []


def test_following_a_console_ends_with_the_vm(host: FakeHost, capsys: pytest.CaptureFixture[str]) -> None:
    start("web")
    record = VmStore().get("web")
    keeper, follower = record.keeper_pid, os.getpid()
    stopper = os.fork()
    if stopper == 0:
        try:
            followed = eventually(lambda: record.console in _open_files(follower))
            os.kill(keeper, signal.SIGTERM)
        finally:
            os._exit(0 if followed else 1)
    capsys.readouterr()
    vm("console", "-f", "web")
    assert os.waitpid(stopper, 0)[1] == 0
    assert "gcs-boot: ready 9.5" in capsys.readouterr().out
    assert end_of(keeper)


def _open_files(pid: int) -> list[str]:
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile
            found.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return found


def test_a_damaged_record_says_what_to_remove(host: FakeHost) -> None:
    directory = VmStore().root / "web"
    directory.mkdir(parents=True)
    for damage in ("{", "[]", '{"name": "web"}', "\x00"):
        (directory / "vm.json").write_text(damage, encoding="utf-8")
        with pytest.raises(VmError, match=r"vm\.json is damaged .*; remove "):
            VmStore().get("web")
    (directory / "vm.json").unlink()
    directory.rmdir()


def test_where_the_state_is() -> None:
    assert state_dir({"XDG_STATE_HOME": "/s"}) == Path("/s/gcsctl")
    expected = Path("/run/gcsctl") if os.geteuid() == 0 else Path.home() / ".local/state/gcsctl"
    assert state_dir({}) == expected


def test_the_debug_shell_is_allowed_by_a_word_for_the_kernel(host: FakeHost) -> None:
    for name, options in (("open", ("--shell",)), ("shut", ())):
        assert start(name, "boot", *options) == 0
        qemu = VmStore().get(name).qemu_pid
        words = Path(f"/proc/{qemu}/cmdline").read_bytes().replace(b"\0", b" ").split()
        assert (b"gcs.shell=on" in words) == bool(options)
        assert vm("stop", name, "--timeout", "0.1") == 0


def test_asking_twice_to_stop_does_not_pull_the_plug(host: FakeHost) -> None:
    """Two `vm stop` at once, or one that was interrupted and begun again: the guest has its time."""
    start("web", "deaf")
    record = VmStore().get("web")
    assert record.qemu_pid is not None
    for _ in range(2):
        os.kill(record.keeper_pid, signal.SIGTERM)
        assert asyncio.run(control.ask(VmStore().control("web"), "share-ls", {}, 10.0)) == []
    assert start_time(record.qemu_pid) is not None
    assert vm("stop", "--timeout", "0.1", "web") == 0
    assert host.leftovers() == []
    assert host.processes() == []


def test_what_killed_ones_have_left_goes_with_the_next_start(host: FakeHost) -> None:
    root = VmStore().root
    for name in (".new-killed", f".old-web-{os.getpid()}", ".old-other-7"):
        (root / name).mkdir(parents=True)
        (root / name / "console.log").write_text("x")
    start("web")
    assert sorted(path.name for path in root.iterdir()) == [".lock", "web"]
    (root / f".old-web-{os.getpid()}").mkdir()
    (root / f".old-web-{os.getpid()}" / "console.log").write_text("x")
    assert vm("stop", "--timeout", "5", "web") == 0
    assert VmStore().list() == []


def test_a_damaged_record_does_not_hide_the_other_vms(
    host: FakeHost, capsys: pytest.CaptureFixture[str]
) -> None:
    start("web")
    directory = VmStore().root / "broken"
    directory.mkdir()
    (directory / "vm.json").write_text("{")
    capsys.readouterr()
    assert vm("ls") == 125
    shown = capsys.readouterr()
    assert [line.split()[0] for line in shown.out.splitlines()] == ["NAME", "web"]
    assert "vm.json is damaged" in shown.err
    (directory / "vm.json").unlink()
    directory.rmdir()


def test_an_environment_with_relative_paths_is_the_keepers_too(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It works in another directory, and must find what the caller finds."""
    for name, value in (("GCS_IMAGE", "image"), ("GCS_CACHE", "./cache"), ("GCS_QEMU", "./qemu")):
        monkeypatch.setenv(name, value)
    with contextlib.chdir(host.root):
        assert start("web") == 0
    assert vm("stop", "web", "--timeout", "5") == 0
    assert host.leftovers() == []


def test_a_relative_state_directory_is_none() -> None:
    """XDG Base Directory Specification: "must be absolute. If an implementation encounters a relative path
    … it should consider the path invalid and ignore it"."""
    assert state_dir({"XDG_STATE_HOME": "here"}) == state_dir({})
