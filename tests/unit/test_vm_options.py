"""What `gcsctl vm start` and `vm run` are told, and the VM that comes of it."""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from gcsagent.host.cli.parser import parse
from gcsagent.host.cli.vm_options import config_from_args
from gcsagent.host.vm.config import VmConfig
from gcsagent.host.vm.disk import Disk
from gcsagent.host.vm.errors import DiskError, InvalidVmConfig, ToolMissing
from gcsagent.host.vm.launcher import VirtualMachine
from gcsagent.host.vm.share import Share
from tests.fakes.vm import FakeHost, fake_host

FAKE = VmConfig(cmdline=("fake=boot",), accel="tcg", vsock="vhost-user")


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHost]:
    yield from fake_host(monkeypatch)


@pytest.mark.parametrize("command", [("vm", "start", "dev"), ("vm", "run")])
def test_every_option_reaches_the_vm_and_its_keeper(command: tuple[str, ...]) -> None:
    words = (
        *("--memory", "256", "--cpus", "1", "--max-memory", "512", "--max-cpus", "2"),
        *("--guest-image", "/image", "--kernel", "/kernel", "--rootfs", "/root", "--append", "quiet"),
        *("--disk", "/data.img", "--disk", "/logs:old:ro", "--share", "/src", "--share", "/doc:d:ro"),
        *("--net", "user", "--mac", "52:54:00:12:34:56", "--accel", "tcg", "--vsock", "vhost-user"),
        *("--boot-timeout", "9", "--forward", "8080:web:80", "--forward", "./s::/run/s"),
    )
    config = config_from_args(parse([*command, *words]))
    assert config == VmConfig(
        memory_mib=256,
        cpus=1,
        max_memory_mib=512,
        max_cpus=2,
        image=Path("/image"),
        kernel=Path("/kernel"),
        rootfs=Path("/root"),
        cmdline=("quiet",),
        disks=(
            Disk(Path("/data.img"), "data", read_only=False),
            Disk(Path("/logs"), "old", read_only=True),
        ),
        shares=(Share(Path("/src"), "src"), Share(Path("/doc"), "d", read_only=True)),
        forwards=("8080:web:80", "./s::/run/s"),
        net="user",
        mac="52:54:00:12:34:56",
        accel="tcg",
        vsock="vhost-user",
        boot_timeout=9.0,
    )
    assert VmConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    "text,disk",
    [
        ("/x/Data Disk.img", Disk(Path("/x/Data Disk.img"), "data-disk", read_only=False)),
        ("d.img:logs", Disk(Path("d.img"), "logs", read_only=False)),
        ("d.img:ro", Disk(Path("d.img"), "d", read_only=True)),
    ],
)
def test_a_disk_is_a_file_a_name_and_a_mode(text: str, disk: Disk) -> None:
    assert Disk.parse(text) == disk


@pytest.mark.parametrize("text", ["", ":name", "d:a:b", "d:-a", "d:" + "x" * 21, "/"])
def test_what_is_no_disk_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InvalidVmConfig, match="disk"):
        Disk.parse(text)
    with pytest.raises(SystemExit):
        parse(["vm", "start", "dev", "--disk", text])
    assert "disk" in capsys.readouterr().err


def test_files_that_are_not_there_are_named_before_anything_runs(host: FakeHost) -> None:
    for config, kind, problem in (
        (dataclasses.replace(FAKE, kernel=Path("/none")), ToolMissing, "there is no kernel /none"),
        (
            dataclasses.replace(FAKE, disks=(Disk(Path("/none"), "d"),)),
            DiskError,
            "disk d: there is no /none",
        ),
    ):
        with pytest.raises(kind, match=problem):
            asyncio.run(VirtualMachine.launch(config))
    assert host.leftovers() == []


def test_another_kernel_is_booted(host: FakeHost) -> None:
    kernel = host.root / "kernel"
    shutil.copy(host.root / "image" / "vmlinuz", kernel)

    async def scenario() -> list[str]:
        async with await VirtualMachine.launch(dataclasses.replace(FAKE, kernel=kernel)) as vm:
            return Path(f"/proc/{vm.pid}/cmdline").read_text().split("\0")

    argv = asyncio.run(scenario())
    assert argv[argv.index("-kernel") + 1] == str(kernel)
    assert argv[argv.index("-initrd") + 1] == str(host.root / "image" / "initramfs")
