"""What storage reads from the kernel and from disks, and what it makes of a request, on made-up files."""

from __future__ import annotations

import asyncio
import json
import logging
import stat
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from gcsagent.agent import mountinfo, undoing
from gcsagent.agent.call import Call
from gcsagent.agent.calls import Caller, Outcome
from gcsagent.agent.journal import RequestMark
from gcsagent.agent.logs import ContextLogger
from gcsagent.agent.overlay import lower_of
from gcsagent.agent.proc import boot_id
from gcsagent.agent.process_dir import ContainerDir
from gcsagent.agent.storage import devices, paths, superblock, tags, users, wanted
from gcsagent.agent.storage.service import StorageService
from gcsagent.agent.storage.superblock import BadSuperblock, VeritySuperblock
from gcsagent.agent.storage.table import Entry, Table
from gcsagent.agent.storage.tools import Tools
from protocol.errors import Code, RpcError
from protocol.families.storage import (
    Device,
    Format,
    FsType,
    MountKind,
    MountStatus,
    MountStorage,
    Unmounted,
    UnmountStorage,
    Verity,
)
from tests.cases.descriptors import descriptors, settled_descriptors
from tests.cases.disks import verity
from tests.fakes import watched_loop

if TYPE_CHECKING:
    from gcsagent.agent.registry import Registry
    from gcsagent.agent.storage.mounter import Mounter

LINE = "531 29 0:52 / /a\\040b rw,nosuid shared:7 master:1 - overlay overlay ro,lowerdir=/l2:/l1"


def tmpfs(ident: str, target: str | None = None, **more: Any) -> MountStorage:
    return MountStorage(ident, MountKind.TMPFS, target=target, **more)


def block(**more: Any) -> MountStorage:
    return MountStorage("m", MountKind.BLOCK, **{"device": Device(serial="s"), **more})


# -- mountinfo ------------------------------------------------------------------------------------


def test_a_line_of_mountinfo() -> None:
    mount = mountinfo.parse(LINE + "\n")
    assert (mount.ident, mount.point) == (531, "/a b")
    assert mount.what() == ["0:52", "/", "overlay"]
    assert mount.options[:3] == ("rw", "nosuid", "ro")


def test_layers_of_an_overlay() -> None:
    line = "1 1 0:1 / /o rw - overlay overlay rw,lowerdir=/l2:/l1,upperdir=/u,workdir=/w"
    assert mountinfo.parse(line).layers() == ["/l2", "/l1", "/u", "/w"]


def test_the_lower_directory_of_a_containers_overlay(monkeypatch: pytest.MonkeyPatch) -> None:
    other = "1 1 0:1 / /c/web/root rw - tmpfs none rw"
    line = r"2 1 0:2 / /c/web/root rw - overlay overlay rw,lowerdir=/a\040b,upperdir=/u,workdir=/w"
    monkeypatch.setattr(mountinfo, "read", lambda: [mountinfo.parse(other), mountinfo.parse(line)])
    assert lower_of(ContainerDir("/c", "web")) == "/a b"
    with pytest.raises(ValueError, match="nothing is mounted on /c/db/root"):
        lower_of(ContainerDir("/c", "db"))


def test_this_machines_mounts_can_be_read() -> None:
    assert mountinfo.at("/proc", mountinfo.read())[-1].fstype == "proc"


def test_below_is_by_whole_names() -> None:
    assert mountinfo.below("/a/b", "/a")
    assert mountinfo.below("/a", "/a")
    assert not mountinfo.below("/ab", "/a")


# -- devices --------------------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two virtio disks, the second behind a root port, and an NVMe one; nodes count as block devices."""
    places = {
        "vda": ("pci0000:00/0000:00:02.0/virtio0/block/vda", "serial", "rootfs"),
        "vdb": ("pci0000:00/0000:00:10.1/0000:03:00.0/virtio4/block/vdb", "serial", "data0"),
        "nvme0n1": ("pci0000:00/0000:00:04.0/nvme/nvme0/nvme0n1", "device/serial", "S3RIAL  "),
    }
    (tmp_path / "sys/block").mkdir(parents=True)
    (tmp_path / "dev").mkdir()
    for name, (place, file, serial) in places.items():
        where = tmp_path / "sys/devices" / place
        (where / file).parent.mkdir(parents=True)
        (where / file).write_text(serial)
        (tmp_path / "sys/block" / name).symlink_to(where)
        (tmp_path / "dev" / name).touch()
    monkeypatch.setattr(stat, "S_ISBLK", lambda mode: True)
    return tmp_path


@pytest.mark.parametrize(
    "device, found",
    [
        (Device(serial="data0"), "vdb"),
        (Device(serial="S3RIAL"), "nvme0n1"),
        (Device(serial="data"), None),
        (Device(virtio="virtio4"), "vdb"),
        (Device(virtio="virtio"), None),
        (Device(pci="0000:03:00.0"), "vdb"),
        (Device(pci="0000:00:10.1"), None),  # a port is not the disk behind it
        (Device(pci="10.1/00.0"), "vdb"),
        (Device(pci="02.0"), "vda"),
        (Device(pci="10.1"), None),
        (Device(pci="00.0"), None),
    ],
)
def test_disks_are_found(machine: Path, device: Device, found: str | None) -> None:
    node = devices.find(device, str(machine / "sys"), str(machine / "dev"))
    assert node == (found and str(machine / "dev" / found))


def test_a_path_must_be_a_block_device() -> None:
    assert devices.find(Device(path="/dev/no-such-disk")) is None
    with pytest.raises(RpcError) as caught:
        devices.find(Device(path="/dev/null"))
    assert caught.value.code is Code.FAILED_PRECONDITION


def test_a_disk_that_does_not_come_is_named_and_its_socket_closed() -> None:
    async def scenario() -> None:
        before = settled_descriptors()
        with pytest.raises(RpcError, match="with serial number none came within") as caught:
            await devices.arrived(Device(serial="none"), 0.05)
        assert caught.value.code is Code.NOT_FOUND
        assert descriptors() == before

    asyncio.run(scenario())


# -- superblocks ----------------------------------------------------------------------------------


def head(offset: int, magic: bytes) -> bytes:
    data = bytearray(superblock.HEAD)
    data[offset : offset + len(magic)] = magic
    return bytes(data)


@pytest.mark.parametrize(
    "offset, magic, name",
    [
        (1080, b"\x53\xef", "ext4"),
        (0, b"XFSB", "xfs"),
        (1024, b"\xe2\xe1\xf5\xe0", "erofs"),
        (0, b"hsqs", "squashfs"),
        (4086, b"SWAPSPACE2", "swap"),
        (65600, b"_BHRfS_M", "btrfs"),
        (69000, b"x", superblock.UNKNOWN),
        (0, b"", superblock.EMPTY),
    ],
)
def test_what_a_disk_holds(offset: int, magic: bytes, name: str) -> None:
    assert superblock.held(head(offset, magic)) == name


def test_the_table_of_a_verity_device() -> None:
    tree, root = verity(bytes(300 * 4096), b"\x01\x02")
    found = VeritySuperblock.parse(tree[:512])
    line = found.table("/dev/vdb", "/dev/vdc", 0, root)
    assert line == f"0 2400 verity 1 /dev/vdb /dev/vdc 4096 4096 300 1 sha256 {root} 0102"
    assert found.table("/d", "/d", 300 * 4096, root).split()[9] == "301"


@pytest.mark.parametrize("damage", [(0, b"x"), (8, b"\x02"), (12, b"\x07"), (64, b"\x03"), (72, bytes(8))])
def test_a_bad_verity_superblock(damage: tuple[int, bytes]) -> None:
    tree, _ = verity(bytes(2 * 4096))
    at, bytes_ = damage
    data = bytearray(tree[:512])
    data[at : at + len(bytes_)] = bytes_
    with pytest.raises(BadSuperblock):
        VeritySuperblock.parse(bytes(data))
    with pytest.raises(BadSuperblock):
        VeritySuperblock.parse(tree[:100])
    with pytest.raises(BadSuperblock):
        VeritySuperblock.parse(tree[:32] + b"sha256; rm".ljust(32, b"\0") + tree[64:512])


def test_the_superblock_is_512_bytes() -> None:
    assert struct.calcsize("<8sII16s32sIIQH6x256s168x") == 512


# -- requests -------------------------------------------------------------------------------------


def test_a_target_is_filled_in() -> None:
    assert wanted.settle(tmpfs("m"), "/run/gcs/mounts", "/run/gcs/state").target == "/run/gcs/mounts/m"
    swap = MountStorage("m", MountKind.SWAP, device=Device(serial="s"))
    assert wanted.settle(swap, "/run/gcs/mounts", "/run/gcs/state").target is None


def overlay(*lower: str, **more: Any) -> MountStorage:
    return MountStorage("m", MountKind.OVERLAY, lower=lower, **more)


@pytest.mark.parametrize(
    "asked, field",
    [
        (MountStorage("m", MountKind.BLOCK), "device"),
        (MountStorage("m", MountKind.VIRTIOFS), "tag"),
        (MountStorage("m", MountKind.BIND), "path"),
        (MountStorage("m", MountKind.OVERLAY), "lower"),
        (MountStorage("m", MountKind.SWAP, device=Device(serial="s"), target="/a"), "target"),
        (tmpfs("m", tag="x"), "tag"),
        (tmpfs("m", format=Format.ON_FIRST_USE), "format"),
        (block(device=Device()), "device"),
        (block(device=Device(serial="s", virtio="virtio1")), "device"),
        (block(device=Device(path="/etc/passwd")), "device"),
        (block(verity=Verity("00" * 32, Device())), "verity.hash_device"),
        (block(verity=Verity("00" * 32), format=Format.ON_FIRST_USE), "format"),
        (block(fstype=FsType.EROFS, format=Format.ON_FIRST_USE), "format"),
        (block(read_only=True, format=Format.ON_FIRST_USE), "format"),
        (block(options=("noatime", "ro")), "options"),
        (tmpfs("m", options=("size=1",)), "options"),
        (overlay("/a", "/b", upper="/u"), "work"),
        (overlay("/a", "/b", work="/u"), "upper"),
        (overlay("/a", "/a"), "lower"),
        (overlay("/a:b"), "lower"),
        (overlay(*(f"/{number}" for number in range(129))), "lower"),
        (tmpfs("m", "/run/gcs/state"), "target"),
        (tmpfs("m", "/run/gcs"), "target"),
        (tmpfs("m", "/sys/fs/cgroup"), "target"),
    ],
)
def test_requests_that_make_no_sense(asked: MountStorage, field: str) -> None:
    with pytest.raises(RpcError) as caught:
        wanted.settle(asked, "/run/gcs/mounts", "/run/gcs/state")
    assert (caught.value.code, caught.value.details["field"]) == (Code.INVALID_ARGUMENT, field)


# -- ways -----------------------------------------------------------------------------------------


def test_directories_are_made_and_taken_back_unless_used(tmp_path: Path) -> None:
    target = str(tmp_path / "a/b/c")
    missing = paths.missing(target, "target")
    assert missing == [str(tmp_path / "a"), str(tmp_path / "a/b"), target]
    paths.make(missing, "target", file=True)
    assert (tmp_path / "a/b/c").is_file()
    assert paths.missing(target, "target") == []
    (tmp_path / "a/other").touch()
    paths.remove(missing)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "other"]


def test_a_file_that_was_written_to_stays(tmp_path: Path) -> None:
    paths.make([str(tmp_path / "f")], "target", file=True)
    (tmp_path / "f").write_text("kept")
    paths.remove([str(tmp_path / "f")])
    assert (tmp_path / "f").exists()


# -- the table ------------------------------------------------------------------------------------


def test_what_is_built_on_a_mount_comes_newest_first(tmp_path: Path) -> None:
    table = Table(str(tmp_path))
    low, high = table.begin(tmpfs("low", "/l")), table.begin(tmpfs("high", "/h"))
    root = table.begin(MountStorage("root", MountKind.OVERLAY, target="/r", lower=("/h/x", "/l")))
    nested = table.begin(tmpfs("nested", "/r/deep"))
    table.begin(tmpfs("other", "/lx"))
    bound = table.begin(MountStorage("bound", MountKind.BIND, target="/b", path="/r/deep/er"))
    assert users.built_on(table, low) == [bound, nested, root]
    assert users.built_on(table, high) == [bound, nested, root]
    assert users.built_on(table, bound) == []


def test_a_table_is_read_again(tmp_path: Path) -> None:
    table = Table(str(tmp_path))
    entry = table.begin(block(target="/t", verity=Verity("ab" * 32), options=("noatime",)))
    entry.status, entry.holders, entry.mount_id = MountStatus.MOUNTED, ["m", "n"], 77
    entry.made, entry.before, entry.formatted = ["/t"], [1, 2], True
    entry.what, entry.leaves = ["0:52", "/", "overlay"], "/t"
    entry.dropped = RequestMark("r", "d")
    table.save(entry)
    table.forget(table.begin(tmpfs("gone", "/g")))
    (tmp_path / "storage/00000009.json.tmp").write_text("{")
    again = Table(str(tmp_path))
    again.load()
    [found] = again
    assert (found.number, found.document()) == (1, entry.document())
    assert again.held_as("n") is found
    assert not list(tmp_path.rglob("*.tmp"))
    assert again.begin(tmpfs("next", "/x")).number == 2


def test_files_that_are_broken_newer_or_of_an_earlier_boot(tmp_path: Path) -> None:
    table = Table(str(tmp_path))
    for number in range(4):
        table.begin(tmpfs(f"m{number}", f"/{number}"))
    files = sorted((tmp_path / "storage").iterdir())
    changes: list[dict[str, Any]] = [{"boot_id": "x"}, {"version": 99}, {"holders": []}]
    for file, change in zip(files, changes, strict=False):
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    assert json.loads(files[3].read_text())["boot_id"] == boot_id()
    again = Table(str(tmp_path))
    again.load()
    assert [entry.ident for entry in again] == ["m3"]
    assert sorted((tmp_path / "storage").iterdir()) == files[1:]
    assert again.begin(tmpfs("next", "/x")).number == 5


# -- what has no room, no time, or is not there ----------------------------------------------------


def test_a_table_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gcsagent.agent.storage.table.MAX_MOUNTS", 1)
    table = Table(str(tmp_path))
    first = table.begin(tmpfs("a", "/a"))
    with pytest.raises(RpcError) as caught:
        table.begin(tmpfs("b", "/b"))
    assert caught.value.code is Code.RESOURCE_EXHAUSTED
    table.forget(first)
    assert table.begin(tmpfs("b", "/b")).ident == "b"


def test_swapping_to_the_same_disk_is_the_same(tmp_path: Path) -> None:
    table = Table(str(tmp_path))
    asked = MountStorage("a", MountKind.SWAP, device=Device(serial="s"))
    entry = table.begin(asked)
    assert table.in_the_place_of(MountStorage("b", MountKind.SWAP, device=Device(serial="s"))) is entry
    assert table.in_the_place_of(MountStorage("b", MountKind.SWAP, device=Device(serial="t"))) is None


def test_what_is_true_anyway_need_not_be_written_down(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = Table(str(tmp_path))
    entry = table.begin(tmpfs("a", "/a"))
    (tmp_path / "storage" / "00000001.json").unlink()
    (tmp_path / "storage").rmdir()
    (tmp_path / "storage").touch()
    with pytest.raises(OSError, match="exists"):
        table.save(entry)
    table.note(entry)
    assert "a mount cannot be written down" in caplog.text


def test_directories_that_somebody_else_makes_meanwhile(tmp_path: Path) -> None:
    made = paths.missing(f"{tmp_path}/a/b", "target")
    (tmp_path / "a").mkdir()
    paths.make(made, "target", file=False)
    paths.make(made, "target", file=False)
    assert (tmp_path / "a/b").is_dir()


class Slow:
    """In the Caller's place: whatever is run takes too long."""

    async def run(self, argv: list[str], seconds: float, **_: Any) -> Outcome:
        return Outcome(-9, timed_out=True, stderr="")

    def forget(self, key: str) -> None:
        pass


def test_a_tool_that_takes_too_long(tmp_path: Path) -> None:
    entry = Table(str(tmp_path)).begin(tmpfs("a", "/a"))
    tools = Tools(cast(Caller, Slow()))
    with pytest.raises(RpcError, match="cannot mount a: mount took more than 5 s") as caught:
        asyncio.run(tools.run(entry, ["mount"], 5.0, what="mount a"))
    assert caught.value.code is Code.DEADLINE_EXCEEDED


def test_a_tag_is_looked_for_where_the_kernel_lists_tags(tmp_path: Path) -> None:
    listed = tmp_path / "virtiofs"
    asyncio.run(tags.arrived("any", 0.0, str(listed)))  # an older kernel: mounting will tell
    (listed / "1").mkdir(parents=True)
    (listed / "1/tag").write_text("work\n")
    asyncio.run(tags.arrived("work", 0.0, str(listed)))
    (listed / "2").mkdir()
    with pytest.raises(RpcError, match=r"tag none came within 0\.01 s; there are: work$") as caught:
        asyncio.run(tags.arrived("none", 0.01, str(listed)))
    assert (caught.value.code, caught.value.details["field"]) == (Code.NOT_FOUND, "tag")


class Stubborn:
    """A mounter that fails, if it shall, and whose undoing waits until it is let through."""

    def __init__(self, fails: int = 0) -> None:
        self.made, self.fails = 0, fails
        self.undoing, self.through = asyncio.Event(), asyncio.Event()

    async def make(self, _entry: Entry, _seconds: float) -> None:
        self.made += 1
        if self.made <= self.fails:
            raise RpcError(Code.INTERNAL, "no such luck")

    def place(self, entry: Entry) -> str:
        return entry.target

    async def undo(self, _entry: Entry, _seconds: float = 0.0) -> None:
        self.undoing.set()
        await self.through.wait()


def service(path: Path, mounter: Stubborn) -> StorageService:
    registry = SimpleNamespace(
        caller=cast("Caller", None),
        spawn=asyncio.ensure_future,
        containers={},
        journal=SimpleNamespace(record=lambda *_: None),
    )
    made = StorageService(cast("Registry", registry), str(path / "state"), str(path))
    made.mounter = cast("Mounter", mounter)
    return made


def call(method: str) -> Call:
    return Call(method, None, ContextLogger(logging.getLogger("test"), {}))


def test_a_mount_whose_undoing_takes_long_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longer than its request is: whoever asks for the same meanwhile neither joins it nor spins."""
    monkeypatch.setattr(undoing, "CLEANUP_SECONDS", 0.01)

    async def scenario() -> None:
        mounter = Stubborn(fails=1)
        storage = service(tmp_path, mounter)
        with pytest.raises(RpcError, match="no such luck"):
            await storage.mount(tmpfs("m"), call("storage.mount"))
        again = asyncio.ensure_future(storage.mount(tmpfs("m"), call("storage.mount")))
        done, _ = await asyncio.wait([again], timeout=0.05)
        assert (done, mounter.made) == (set(), 1)
        mounter.through.set()
        assert (await again).status is MountStatus.MOUNTED

    watched_loop.run(scenario())


def test_who_joins_a_mount_as_it_is_unmounted_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is looked at who uses it."""
    looking, looked = asyncio.Event(), asyncio.Event()

    async def containers(*_: object) -> list[str]:
        looking.set()
        await looked.wait()
        return []

    async def scenario() -> None:
        monkeypatch.setattr(users, "containers", containers)
        mounter = Stubborn()
        storage = service(tmp_path, mounter)
        await storage.mount(tmpfs("a", "/place"), call("storage.mount"))
        leaving = asyncio.ensure_future(storage.unmount(UnmountStorage("a"), call("storage.unmount")))
        await looking.wait()
        await storage.mount(tmpfs("b", "/place"), call("storage.mount"))
        looked.set()
        mounter.through.set()
        assert await leaving == Unmounted()
        assert [entry.holders for entry in storage.table] == [["b"]]

    watched_loop.run(scenario())


def test_a_second_unmount_of_one_id_does_not_take_another_holder_s(tmp_path: Path) -> None:
    async def scenario() -> None:
        mounter = Stubborn()
        storage = service(tmp_path, mounter)
        await storage.mount(tmpfs("a", "/place"), call("storage.mount"))
        await storage.mount(tmpfs("d", "/place/d"), call("storage.mount"))
        whole = UnmountStorage("a", dependents=True)
        first = asyncio.ensure_future(storage.unmount(whole, call("storage.unmount")))
        await mounter.undoing.wait()
        await storage.mount(tmpfs("b", "/place"), call("storage.mount"))
        assert await storage.unmount(UnmountStorage("a"), call("storage.unmount")) == Unmounted()
        mounter.through.set()
        assert await first == Unmounted(("d",))
        assert [entry.holders for entry in storage.table] == [["b"]]

    watched_loop.run(scenario())
