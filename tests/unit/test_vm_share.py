"""Shares, with fakes for QEMU and virtiofsd: how they come and go, and what each failure leaves."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from gcsagent.host.cli.parser import parse
from gcsagent.host.vm.config import VmConfig
from gcsagent.host.vm.errors import (
    InvalidVmConfig,
    LaunchError,
    PlugError,
    QmpError,
    ShareError,
    ToolMissing,
    VmError,
    VmNotRunning,
)
from gcsagent.host.vm.launcher import VirtualMachine
from gcsagent.host.vm.named import VmStore
from gcsagent.host.vm.share import Share, daemon_argv
from gcsagent.host.vm.shareplug import PluggedShare
from tests.fakes.vm import FakeHost, end_of, fake_host_of_named


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHost]:
    yield from fake_host_of_named(monkeypatch)


@pytest.fixture
def src(host: FakeHost) -> Path:
    path = host.root / "src"
    path.mkdir()
    return path


def config(*shares: Share, mode: str = "boot") -> VmConfig:
    return VmConfig(cmdline=(f"fake={mode}",), accel="tcg", vsock="vhost-user", shares=shares)


def within(
    host: FakeHost, body: Callable[[VirtualMachine], Awaitable[None]], *shares: Share, mode: str = "boot"
) -> None:
    async def scenario() -> None:
        async with asyncio.timeout(20), await VirtualMachine.launch(config(*shares, mode=mode)) as vm:
            await body(vm)

    asyncio.run(scenario())
    clean(host)


def clean(host: FakeHost) -> None:
    assert host.leftovers() == []
    assert host.processes() == []


def gcsctl(*words: str) -> int:
    args = parse(["vm", *words])
    code = asyncio.run(args.handler(args))
    assert isinstance(code, int)
    return code


# -- the words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text,share",
    [
        ("/src", Share(Path("/src"), "src")),
        ("/src:code", Share(Path("/src"), "code")),
        ("/src:ro", Share(Path("/src"), "src", read_only=True)),
        ("/src:code:ro", Share(Path("/src"), "code", read_only=True)),
        ("/my files/.a b", Share(Path("/my files/.a b"), "a-b")),
    ],
)
def test_a_share_is_a_directory_a_tag_and_a_mode(text: str, share: Share) -> None:
    assert Share.parse(text) == share
    assert share.target == f"/run/gcs/shares/{share.tag}"


@pytest.mark.parametrize(
    "text", ["", ":tag", "/a:b:c", "/a:b:ro:ro", "/", "/a:-x", f"/a:{'x' * 37}", "/a:a b"]
)
def test_what_is_no_share_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InvalidVmConfig, match="share"):
        Share.parse(text)
    with pytest.raises(SystemExit):
        parse(["vm", "start", "web", "--share", text])
    assert "share" in capsys.readouterr().err


def test_the_daemon_is_told_what_the_guest_must_not_do(tmp_path: Path) -> None:
    share = Share(tmp_path, "src", read_only=True)
    argv = daemon_argv(Path("/v"), share, 5)
    assert argv[:5] == ["/v", "--fd", "5", "--shared-dir", str(tmp_path)]
    assert "--readonly" in argv
    assert "--readonly" not in daemon_argv(Path("/v"), Share(tmp_path, "src"), 5)


# -- since the boot -----------------------------------------------------------------------------------


def test_shares_are_there_since_the_boot_and_go_with_the_vm(host: FakeHost, src: Path) -> None:
    async def body(vm: VirtualMachine) -> None:
        assert vm.shares() == [
            PluggedShare("again", str(src), True, False),
            PluggedShare("src", str(src), False, False),
        ]
        assert len(host.processes()) == 4  # QEMU, and the daemons for vsock and both shares
        with pytest.raises(ShareError, match=r"^share src is there since the boot, and stays$"):
            await vm.unplug_share("src")
        [directory] = (host.root / "run").iterdir()
        assert sorted(path.name for path in directory.iterdir()) == ["lock", "vhost-user", "vsock"]

    within(host, body, Share(src, "src"), Share(src, "again", read_only=True))


def test_what_cannot_be_shared_is_told_before_anything_runs(host: FakeHost, src: Path) -> None:
    (src / "file").touch()
    for shares, kind, problem in (
        ([Share(src / "none", "a")], ShareError, "share a: .*/none is not a directory"),
        ([Share(src / "file", "a")], ShareError, "share a: .*/file is not a directory"),
        ([Share(src, "a"), Share(src, "a")], InvalidVmConfig, "a share with the tag a already"),
    ):
        with pytest.raises(kind, match=problem):
            asyncio.run(VirtualMachine.launch(config(*shares)))
        clean(host)


def test_a_missing_virtiofsd_names_the_script_that_fetches_it(
    host: FakeHost, src: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GCS_VIRTIOFSD")
    monkeypatch.setenv("PATH", str(host.root / "image"))
    with pytest.raises(ToolMissing, match=r"virtiofsd is neither in .*`make tools`.*, or set GCS_VIRTIOFSD"):
        asyncio.run(VirtualMachine.launch(config(Share(src, "src"))))
    clean(host)


def test_a_daemon_that_cannot_start_is_the_reason(
    host: FakeHost, src: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VIRTIOFSD", "refuse")
    reason = r"virtiofsd of share src exited 1: \[ERROR virtiofsd\] no namespaces here"
    with pytest.raises(VmError, match=reason):
        asyncio.run(VirtualMachine.launch(config(Share(src, "src"), mode="hang")))
    clean(host)


def test_a_daemons_death_ends_the_vm(host: FakeHost, src: Path) -> None:
    async def body(vm: VirtualMachine) -> None:
        other = host.root / "other"
        other.mkdir()
        await vm.plug_share(Share(other, "other"))
        os.kill(daemons(vm, host)[-1], signal.SIGKILL)
        ended = await vm.wait()
        assert not ended.clean
        assert ended.reason in (
            "virtiofsd of share src exited -9: no output",
            "virtiofsd of share other exited -9: no output",
        )

    within(host, body, Share(src, "src"))


def test_a_daemon_that_ends_a_moment_before_a_qemu_in_order_is_no_crash(host: FakeHost, src: Path) -> None:
    async def body(vm: VirtualMachine) -> None:
        ending = asyncio.create_task(vm.powerdown())
        await vm.guest.shares.ended(20)
        assert daemons(vm, host) == []
        os.kill(vm.pid, signal.SIGUSR1)  # only now it goes on to its own end
        ended = await ending
        assert (ended.clean, ended.reason, ended.status) == (True, "the guest powered off", 0)

    within(host, body, Share(src, "src"), mode="lets-go-first")


def test_a_qemu_that_crashes_is_the_reason_and_not_its_daemons(host: FakeHost, src: Path) -> None:
    async def body(vm: VirtualMachine) -> None:
        os.kill(vm.pid, signal.SIGABRT)
        assert (await vm.wait()).reason == "QEMU was killed by SIGABRT: no output"

    within(host, body, Share(src, "src"))


def daemons(vm: VirtualMachine, host: FakeHost) -> list[int]:
    """Of the shares."""
    return sorted(set(host.processes()) - {vm.pid, vm.daemon_pid})


# -- while it runs ------------------------------------------------------------------------------------


def test_shares_come_and_go(host: FakeHost, src: Path) -> None:
    async def body(vm: VirtualMachine) -> None:
        await vm.plug_share(Share(src, "src", read_only=True))
        assert vm.shares() == [PluggedShare("src", str(src), True, True)]
        assert len(daemons(vm, host)) == 1
        with pytest.raises(InvalidVmConfig, match="a share with the tag src already"):
            await vm.plug_share(Share(src, "src"))
        await vm.unplug_share("src")
        assert (vm.shares(), daemons(vm, host)) == ([], [])
        with pytest.raises(ShareError, match="share src does not exist"):
            await vm.unplug_share("src")
        await vm.plug_share(Share(src, "src"))
        await vm.plug_share(Share(src, "two"))
        with pytest.raises(PlugError, match="all ports"):
            await vm.plug_share(Share(src, "three"))
        assert len(daemons(vm, host)) == 2

    within(host, body)


def test_a_share_that_the_guest_keeps_stays_whole(host: FakeHost, src: Path) -> None:
    async def body(vm: VirtualMachine) -> None:
        await vm.plug_share(Share(src, "src"))
        with pytest.raises(QmpError, match=r"did not let go of share-src within 0\.05 s"):
            await vm.unplug_share("src", timeout=0.05)
        [daemon] = daemons(vm, host)
        assert vm.shares() == [PluggedShare("src", str(src), False, True)]
        os.kill(daemon, signal.SIGKILL)  # which is noticed still
        assert (await vm.wait()).reason == "virtiofsd of share src exited -9: no output"

    within(host, body, mode="keeps-device")


@pytest.mark.parametrize("mode,problem", [("refuse", "no namespaces here"), ("die", "lost my mind")])
def test_a_daemon_that_fails_while_it_is_plugged_in_is_named(
    host: FakeHost, src: Path, monkeypatch: pytest.MonkeyPatch, mode: str, problem: str
) -> None:
    async def body(vm: VirtualMachine) -> None:
        monkeypatch.setenv("FAKE_VIRTIOFSD", mode)
        with pytest.raises(LaunchError, match=rf"^virtiofsd of share src exited 1: .*{problem}$"):
            await vm.plug_share(Share(src, "src"))
        assert (vm.shares(), daemons(vm, host)) == ([], [])
        monkeypatch.setenv("FAKE_VIRTIOFSD", "")
        await vm.plug_share(Share(src, "src"))

    within(host, body)


# -- by way of the keeper -----------------------------------------------------------------------------


def test_gcsctl_has_the_keeper_share(
    host: FakeHost, src: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(host.root)
    options = ("--accel", "tcg", "--vsock", "vhost-user", "--append", "fake=boot", "--share", "src:boot:ro")
    assert gcsctl("start", "web", *options) == 0
    capsys.readouterr()
    assert gcsctl("share", "add", "web", "./src", "--no-mount") == 0
    assert capsys.readouterr().out == "src\n"
    assert gcsctl("share", "ls", "web") == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["TAG", "MODE", "REMOVABLE", "DIRECTORY"],
        ["boot", "ro", "since", "boot", str(src)],
        ["src", "rw", "plugged", str(src)],
    ]
    with pytest.raises(InvalidVmConfig, match="tag src already"):
        gcsctl("share", "add", "web", "./src", "--no-mount")
    with pytest.raises(ShareError, match="not a directory"):
        gcsctl("share", "add", "web", "./none", "--no-mount")
    with pytest.raises(ShareError, match="since the boot"):
        gcsctl("share", "rm", "--force", "web", "boot")
    assert gcsctl("share", "rm", "--force", "web", "src") == 0
    capsys.readouterr()
    assert gcsctl("share", "ls", "--json", "web") == 0
    assert [each["tag"] for each in json.loads(capsys.readouterr().out)] == ["boot"]
    os.kill(VmStore().get("web").keeper_pid, signal.SIGKILL)
    with pytest.raises(VmNotRunning):
        gcsctl("share", "ls", "web")
    assert gcsctl("stop", "web") == 0
    for pid in host.processes():  # they die with the keeper, but after it
        assert end_of(pid)
    assert host.processes() == []
