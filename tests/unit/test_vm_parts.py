"""The choices a launch makes and the command lines it builds."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import fcntl
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from gcsagent.host.vm import accel, tools, vsockdev
from gcsagent.host.vm.config import VmConfig
from gcsagent.host.vm.disk import Disk, detect_fstype
from gcsagent.host.vm.errors import (
    DiskError,
    InvalidVmConfig,
    LaunchError,
    ToolMissing,
    UnsuitableTool,
    VmError,
)
from gcsagent.host.vm.nic import Nic
from gcsagent.host.vm.process import Child
from gcsagent.host.vm.qemu import QemuConfig, kernel_cmdline, qemu_argv
from gcsagent.host.vm.rundir import PrivateDirectory
from gcsagent.host.vm.share import Share
from tests.cases.descriptors import descriptors, settled_descriptors
from tests.fakes.vm import script

MAC = "52:54:00:12:34:56"
QEMU = QemuConfig(
    qemu=Path("/q"),
    accelerator="tcg",
    memory_mib=512,
    cpus=2,
    kernel=Path("/k"),
    initramfs=Path("/i"),
    vsock="vhost-user-vsock",
    vsock_fd=5,
    vsock_cid=3,
    qmp_fd=6,
)


def values(argv: list[str], option: str) -> list[str]:
    return [argv[index + 1] for index, word in enumerate(argv) if word == option]


BEHIND_PORT = {"id": "vsock", "bus": "vsock-port"}


def vsock(argv: list[str]) -> object:
    """The vsock device, which follows the port that makes it removable."""
    devices = values(argv, "-device")
    port = devices.index("pcie-root-port,id=vsock-port,chassis=1,slot=1")
    return json.loads(devices[port + 1])


def test_a_tcg_guest_with_the_daemon_shares_its_memory() -> None:
    argv = qemu_argv(QEMU)
    assert argv[0] == "/q"
    assert values(argv, "-accel") == ["tcg,thread=multi"]
    assert values(argv, "-cpu") == ["max"]
    assert "memory-backend-memfd,id=ram,size=512M,share=on" in values(argv, "-object")
    assert values(argv, "-machine")[0].endswith("memory-backend=ram")
    assert "socket,id=vsock0,fd=5" in values(argv, "-chardev")
    assert vsock(argv) == {"driver": "vhost-user-vsock-pci", **BEHIND_PORT, "chardev": "vsock0"}
    assert "socket,id=qmp,fd=6" in values(argv, "-chardev")
    assert "-no-reboot" in argv
    assert "pvpanic-pci" in values(argv, "-device")
    assert {"virtio-rng-pci,rng=entropy", "vmgenid,guid=auto"} < set(values(argv, "-device"))
    assert values(argv, "-qmp") == []


def test_a_kvm_guest_with_vhost_vsock_can_be_given_shares() -> None:
    argv = qemu_argv(dataclasses.replace(QEMU, accelerator="kvm", vsock="vhost-vsock", vsock_cid=4711))
    assert values(argv, "-accel") == ["kvm"]
    assert values(argv, "-cpu") == ["host"]
    assert vsock(argv) == {"driver": "vhost-vsock-pci", **BEHIND_PORT, "guest-cid": 4711, "vhostfd": "5"}
    assert "memory-backend-memfd,id=ram,size=512M,share=on" in values(argv, "-object")
    assert "tsc=reliable" not in values(argv, "-append")[0]


def test_a_second_monitor_listens_where_it_is_wanted() -> None:
    argv = qemu_argv(dataclasses.replace(QEMU, qmp_path=Path("/a,b/qmp")))
    assert values(argv, "-qmp") == ["unix:/a,,b/qmp,server=on,wait=off"]


def test_disks_are_named_by_serial_and_on_the_kernel_command_line() -> None:
    disks = (Disk(Path("/a,b.img"), "rootfs", "erofs"), Disk(Path("/c"), "data", "ext4", read_only=False))
    config = dataclasses.replace(QEMU, disks=disks)
    argv = qemu_argv(config)
    first, second = (json.loads(value) for value in values(argv, "-blockdev"))
    assert (first["file"]["filename"], first["read-only"], second["read-only"]) == ("/a,b.img", True, False)
    assert "virtio-blk-pci,id=disk-rootfs,drive=disk-rootfs,serial=rootfs" in values(argv, "-device")
    words = kernel_cmdline(config).split()
    assert "gcs.disk.rootfs=erofs" in words
    assert "gcs.disk.data=ext4" in words


def test_shares_are_named_by_tag_and_on_the_kernel_command_line() -> None:
    shares = ((Share(Path("/src"), "src"), 7), (Share(Path("/doc"), "doc", read_only=True), 8))
    config = dataclasses.replace(QEMU, shares=shares)
    argv = qemu_argv(config)
    assert {"socket,id=share-src,fd=7", "socket,id=share-doc,fd=8"} < set(values(argv, "-chardev"))
    [src, doc] = [json.loads(word) for word in values(argv, "-device") if "vhost-user-fs" in word]
    assert src == {"driver": "vhost-user-fs-pci", "id": "share-src", "chardev": "share-src", "tag": "src"}
    assert doc["tag"] == "doc"
    assert {"gcs.share.src=rw", "gcs.share.doc=ro"} < set(kernel_cmdline(config).split())


def test_a_network_card_is_named_by_its_address() -> None:
    argv = qemu_argv(dataclasses.replace(QEMU, nics=(Nic(MAC),)))
    assert [json.loads(text) for text in values(argv, "-netdev")] == [
        {"type": "user", "id": "net-nic-525400123456"}
    ]
    [card] = [text for text in values(argv, "-device") if "virtio-net" in text]
    assert json.loads(card) == {
        "driver": "virtio-net-pci",
        "id": "nic-525400123456",
        "netdev": "net-nic-525400123456",
        "mac": MAC,
        "romfile": "",
    }
    assert Nic.named("nic-525400123456") == Nic(MAC)
    assert values(qemu_argv(QEMU), "-netdev") == []


def test_the_callers_words_come_last() -> None:
    words = kernel_cmdline(dataclasses.replace(QEMU, cmdline=("loglevel=7", "gcs.port=5"))).split()
    assert words[:3] == ["console=ttyS0", "panic=-1", "loglevel=5"]
    assert words[-2:] == ["loglevel=7", "gcs.port=5"]


@pytest.mark.parametrize(
    "change",
    [
        {"memory_mib": 64},
        {"cpus": 0},
        {"cpus": 65},
        {"cmdline": ("two words",)},
        {"cmdline": ("line\nbreak",)},
        {"cmdline": ("",)},
        {"disks": (Disk(Path("/a"), "x", "erofs"), Disk(Path("/b"), "x", "erofs"))},
    ],
)
def test_impossible_machines_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidVmConfig):
        dataclasses.replace(QEMU, **change)


@pytest.mark.parametrize("name", ["", "a" * 21, "Root", "../x", "a,b", "-a", "a=b"])
def test_impossible_disk_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidVmConfig, match="disk name"):
        Disk(Path("/a"), name, "erofs")


@pytest.mark.parametrize(
    "change",
    [
        *({"port": 0}, {"port": 1 << 32}, {"boot_timeout": 0}, {"boot_timeout": -1}),
        *({"net": "tap"}, {"mac": MAC}, {"net": "user", "mac": "01:00:5e:00:00:01"}),
        {"net": "user", "mac": "52:54:00:12:34"},
    ],
)
def test_impossible_configurations_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidVmConfig):
        VmConfig(**change)


def test_a_configuration_survives_json() -> None:
    disk = Disk(Path("/d"), "d", "ext4")
    config = VmConfig(
        rootfs=Path("/r"), disks=(disk,), cmdline=("a=1",), boot_timeout=2.5, net="user", mac=MAC
    )
    assert VmConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def cpuinfo(path: Path, flags: str) -> Path:
    path.write_text(f"processor\t: 0\nflags\t\t: fpu {flags} sse\n", encoding="ascii")
    return path


def test_no_vmx_means_tcg(tmp_path: Path) -> None:
    info = cpuinfo(tmp_path / "cpuinfo", "vme")
    choice = accel.choose("auto", device=Path("/dev/zero"), cpuinfo=info)
    assert (choice.name, choice.reason) == ("tcg", f"neither vmx nor svm in {info}")
    with pytest.raises(InvalidVmConfig, match="KVM was asked for but cannot be used: neither vmx nor svm"):
        accel.choose("kvm", device=Path("/dev/zero"), cpuinfo=info)


def test_a_kvm_device_that_does_not_open_means_tcg(tmp_path: Path) -> None:
    info = cpuinfo(tmp_path / "cpuinfo", "svm")
    choice = accel.choose("auto", device=tmp_path / "kvm", cpuinfo=info)
    assert str(choice) == f"TCG ({tmp_path}/kvm: No such file or directory)"


def test_a_device_that_makes_no_vcpu_means_tcg(tmp_path: Path) -> None:
    info = cpuinfo(tmp_path / "cpuinfo", "vmx")
    choice = accel.choose("auto", device=Path("/dev/null"), cpuinfo=info)
    assert str(choice) == "TCG (/dev/null cannot create a vcpu: Inappropriate ioctl for device)"


def test_a_vcpu_means_kvm_with_a_way_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = cpuinfo(tmp_path / "cpuinfo", "vmx")
    calls: list[int] = []

    def ioctl(fd: int, request: int, argument: int = 0) -> int:
        calls.append(request)
        return accel.KVM_API_VERSION if request == accel.KVM_GET_API_VERSION else os.dup(fd)

    before = settled_descriptors()
    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    choice = accel.choose("auto", device=Path("/dev/null"), cpuinfo=info)
    assert (choice.name, choice.may_fall_back) == ("kvm", True)
    assert calls == [accel.KVM_GET_API_VERSION, accel.KVM_CREATE_VM, accel.KVM_CREATE_VCPU]
    assert not accel.choose("kvm", device=Path("/dev/null"), cpuinfo=info).may_fall_back
    assert descriptors() == before


def test_an_unknown_accelerator_is_refused() -> None:
    with pytest.raises(InvalidVmConfig, match="'hax' is not one of auto, kvm, tcg"):
        accel.choose("hax")


def test_vsock_choice_follows_the_device(tmp_path: Path) -> None:
    missing = tmp_path / "vhost-vsock"
    choice = vsockdev.choose("auto", device=missing)
    assert str(choice) == f"vhost-user-vsock ({missing}: No such file or directory)"
    assert vsockdev.choose("auto", device=Path("/dev/null")).kind == "vhost-vsock"
    assert vsockdev.choose("vhost-user", device=Path("/dev/null")).kind == "vhost-user-vsock"
    with pytest.raises(InvalidVmConfig, match="load vhost_vsock or use auto"):
        vsockdev.choose("vhost", device=missing)
    with pytest.raises(InvalidVmConfig, match="not one of"):
        vsockdev.choose("usb")


def test_a_taken_cid_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    claimed: list[int] = []

    def ioctl(fd: int, request: int, argument: bytes) -> int:
        assert request == vsockdev.VHOST_VSOCK_SET_GUEST_CID
        (cid,) = struct.unpack("=Q", argument)
        if cid in (100, 101):
            raise OSError(errno.EADDRINUSE, "Address already in use")
        claimed.append(cid)
        return 0

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    picks = iter((100, 101, 102))
    fd, cid = vsockdev.reserve_cid(Path("/dev/null"), lambda: next(picks))
    os.close(fd)
    assert (cid, claimed) == (102, [102])
    with pytest.raises(LaunchError, match="CID 100 is in use, no free one in 32 attempts"):
        vsockdev.reserve_cid(Path("/dev/null"), lambda: 100)


def test_a_kernel_device_is_renewed_with_the_same_cid(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    claimed: list[int] = []

    def ioctl(fd: int, request: int, argument: bytes) -> int:
        (cid,) = struct.unpack("=Q", argument)
        if len(claimed) == 2:
            raise OSError(errno.EADDRINUSE, "Address already in use")
        claimed.append(cid)
        return 0

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    monkeypatch.setattr(vsockdev, "VHOST_VSOCK", Path("/dev/null"))

    async def scenario() -> None:
        choice = vsockdev.VsockChoice("vhost-vsock", "asked for")
        device = await vsockdev.VsockDevice.create(choice, tmp_path)
        address = device.address
        device.handed_over()
        await device.renew()
        assert claimed == [device.cid, device.cid]
        assert device.address == address == f"vsock:{device.cid}"
        with pytest.raises(LaunchError, match=f"CID {device.cid} is in use, no free one in 1 attempts"):
            await device.renew()
        assert device.fd == -1

    before = settled_descriptors()
    asyncio.run(scenario())
    assert descriptors() == before


def test_a_device_that_is_no_vhost_is_named() -> None:
    with pytest.raises(LaunchError, match="/dev/null refuses a guest CID: Inappropriate ioctl"):
        vsockdev.reserve_cid(Path("/dev/null"))


def test_the_daemons_command_line_bounds_packets() -> None:
    argv = vsockdev.daemon_argv(Path("/d"), Path("/r/control"), Path("/r/uds"), 3)
    assert argv == ["/d", "--vm", "guest-cid=3,socket=/r/control,uds-path=/r/uds,tx-buffer-size=28672"]
    with pytest.raises(LaunchError, match="comma"):
        vsockdev.daemon_argv(Path("/d"), Path("/r,x/control"), Path("/r/uds"), 3)


@pytest.mark.parametrize(
    "offset,magic,fstype",
    [(1024, b"\xe2\xe1\xf5\xe0", "erofs"), (0, b"hsqs", "squashfs"), (1080, b"\x53\xef", "ext4")],
)
def test_file_systems_are_known_by_their_magic(
    tmp_path: Path, offset: int, magic: bytes, fstype: str
) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(offset) + magic + bytes(4096))
    assert detect_fstype(image) == fstype


@pytest.mark.parametrize("content", [b"", b"hsq", b"\x7fELF" + bytes(5000)])
def test_other_files_are_no_disks(tmp_path: Path, content: bytes) -> None:
    image = tmp_path / "image"
    image.write_bytes(content)
    with pytest.raises(DiskError, match=r"holds no file system that the guest can mount"):
        detect_fstype(image)


def test_an_image_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match=r"cannot read disk image .*/gone: No such file"):
        detect_fstype(tmp_path / "gone")


def test_tools_are_found_in_order(tmp_path: Path) -> None:
    cached = tmp_path / "cache" / "tools" / "current" / "bin"
    on_path = tmp_path / "path"
    cached.mkdir(parents=True)
    on_path.mkdir()
    env = {"GCS_CACHE": str(tmp_path / "cache"), "PATH": str(on_path)}
    with pytest.raises(ToolMissing, match=r"neither in .* nor in PATH: run `make tools` .* or set GCS_QEMU"):
        tools.find_tool(tools.QEMU, env)
    with pytest.raises(ToolMissing, match=r"install erofs-utils"):
        tools.find_tool(tools.MKFS_EROFS, env)
    script(on_path / tools.QEMU, "")
    assert tools.find_tool(tools.QEMU, env) == on_path / tools.QEMU
    script(cached / tools.QEMU, "")
    assert tools.find_tool(tools.QEMU, env) == cached / tools.QEMU
    own = script(tmp_path / "own", "")
    assert tools.find_tool(tools.QEMU, {**env, "GCS_QEMU": str(own)}) == own
    with pytest.raises(ToolMissing, match=r"GCS_QEMU=/nonexistent is not an executable file"):
        tools.find_tool(tools.QEMU, {**env, "GCS_QEMU": "/nonexistent"})


@pytest.mark.parametrize(
    "version,fit", [("7.2.22", False), ("8.0.5", False), ("8.1.0", True), ("10.0.2", True)]
)
def test_qemu_under_tcg_must_be_new_enough(tmp_path: Path, version: str, fit: bool) -> None:
    qemu = script(tmp_path / "qemu", f"echo QEMU emulator version {version}")
    if fit:
        assert tools.check_qemu(qemu, "tcg") == version
    else:
        with pytest.raises(UnsuitableTool, match=r"needs 8\.1 or later"):
            tools.check_qemu(qemu, "tcg")
    assert tools.check_qemu(qemu, "kvm") == version


def test_a_qemu_that_does_not_run_is_quoted(tmp_path: Path) -> None:
    qemu = script(tmp_path / "qemu", "echo libfoo.so: cannot open >&2; exit 127")
    with pytest.raises(UnsuitableTool, match=r"--version exits 127: libfoo.so: cannot open"):
        tools.qemu_version(qemu)
    with pytest.raises(UnsuitableTool, match=r"does not run"):
        tools.qemu_version(tmp_path)


def test_a_child_that_cannot_be_watched_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []

    def refuse(pid: int) -> int:
        started.append(pid)
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(os, "pidfd_open", refuse)
    with pytest.raises(LaunchError, match=r"^cannot watch sleep: .*too many open files$"):
        Child.spawn("sleep", ["sleep", "60"])
    assert len(started) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(started[0], 0)


def test_a_directory_that_cannot_be_locked_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_fd: int, _operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    before = settled_descriptors()
    with pytest.raises(VmError, match=r"^cannot lock .*/gcs-vm-.*: .*no locks available$"):
        PrivateDirectory.create(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert descriptors() == before
