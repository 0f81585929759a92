"""Parts of saving a VM and of making one from a snapshot: QEMU's by its events, the directory, the words."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gcsagent.host.cli import parser
from gcsagent.host.vm import restoring, saving, snapshotdir
from gcsagent.host.vm.config import VmConfig
from gcsagent.host.vm.copying import copy
from gcsagent.host.vm.disk import Disk
from gcsagent.host.vm.errors import DiskError, InvalidVmConfig, QmpClosed, QmpError, SnapshotError
from gcsagent.host.vm.migration import Migration
from gcsagent.host.vm.qmp import QmpClient, QmpEvent
from gcsagent.host.vm.snapshotdir import RECORD, Saved, SavedDisk, SavedNic, SnapshotStore
from tests.unit.test_vm_qmp import answered, talk

CONFIG = json.loads(json.dumps(VmConfig(memory_mib=300, net="user", mac="52:54:00:00:00:01").to_json()))


def saved(*disks: SavedDisk, nics: tuple[SavedNic, ...] = ()) -> Saved:
    config = {key: CONFIG[key] for key in ("memory_mib", "cpus", "cmdline", "disks", "net", "mac", "port")}
    config["image"] = "/images/one"
    return Saved("nightly", "dev", config, "tcg", "pc-q35-10.0", "10.0.2", 1.0, 0.5, disks, nics)


# -- QEMU's part --------------------------------------------------------------------------------------


def migrating(end: str, body: Callable[[Migration, list[str]], Awaitable[None]]) -> None:
    """``end`` is the status that QEMU tells of as soon as it has answered; none when empty."""
    asked: list[str] = []

    def event(status: str) -> bytes:
        return json.dumps({"event": "MIGRATION", "data": {"status": status}}).encode() + b"\n"

    def answer(command: dict[str, Any]) -> bytes:
        asked.append(command["execute"])
        if command["execute"] in ("migrate", "migrate-incoming"):
            assert command["arguments"]["channels"][0]["addr"]["filename"] == "/there/memory,offset=1"
            return answered(command) + event("active") + (event(end) if end else b"")
        if command["execute"] == "migrate_cancel":
            return answered(command) + event("cancelled")
        if command["execute"] == "query-status":  # twice still at it, then stopped
            return answered(
                command, {"status": "finish-migrate" if asked.count("query-status") < 3 else "paused"}
            )
        return answered(command, {"status": end, "error-desc": "No space left on device"})

    async def scenario(client: QmpClient, events: list[QmpEvent]) -> None:
        migration = Migration(client)
        client._on_event = migration.on_event
        await body(migration, asked)

    talk(answer, scenario)


MEMORY = Path("/there/memory,offset=1")


def test_memory_is_saved_and_loaded() -> None:
    async def body(migration: Migration, asked: list[str]) -> None:
        await migration.save(MEMORY, 5)
        await migration.load(MEMORY, 5)
        assert [each for each in asked if each.startswith("migrate-set") is False] == [
            "migrate",
            *["query-status"] * 3,
            "migrate-incoming",
        ]

    migrating("completed", body)


def test_a_failure_is_quoted() -> None:
    async def body(migration: Migration, asked: list[str]) -> None:
        with pytest.raises(QmpError, match="No space left on device"):
            await migration.save(MEMORY, 5)
        assert asked[-4:] == ["query-migrate", *["query-status"] * 3]

    migrating("failed", body)


def test_what_takes_too_long_is_cancelled() -> None:
    async def body(migration: Migration, asked: list[str]) -> None:
        with pytest.raises(QmpError, match="has not done with"):
            await migration.save(MEMORY, 0.05)
        assert asked[-4:] == ["migrate_cancel", *["query-status"] * 3]

    migrating("", body)


def test_a_vm_that_ends_meanwhile() -> None:
    async def body(migration: Migration, asked: list[str]) -> None:
        asyncio.get_running_loop().call_later(0.05, migration.abandon)
        with pytest.raises(QmpClosed):
            await migration.save(MEMORY, 5)

    migrating("", body)


# -- the directory --------------------------------------------------------------------------------------


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    record = saved(SavedDisk("data", "ext4", "/d", False, True, port="plug1"), nics=(SavedNic("m", "plug0"),))
    record.write(tmp_path)
    assert Saved.load(tmp_path) == record


@pytest.mark.parametrize(
    "text,problem",
    [
        (None, "is no snapshot"),
        ("", "is damaged"),
        ("[]", "is damaged"),
        ("{}", "is damaged"),
        ('{"version": 2}', "was made by a newer gcsctl"),
        ('{"version": 1, "disks": [{}], "nics": []}', "is damaged"),
    ],
)
def test_what_is_no_snapshot_says_so(tmp_path: Path, text: str | None, problem: str) -> None:
    if text is not None:
        (tmp_path / RECORD).write_text(text)
    with pytest.raises(SnapshotError, match=problem):
        Saved.load(tmp_path)


def test_the_store_lists_and_removes(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path / "snapshots")
    assert store.list() == []
    for name in ("two", "one", ".new-three-1"):
        (store.root / name).mkdir(parents=True)
        saved().write(store.root / name)
    assert [name for name, _ in store.list()] == ["one", "two"]
    store.remove("one")
    assert [path.name for path in sorted(store.root.iterdir())] == [".new-three-1", "two"]
    assert store.directory("./here") == Path("here").absolute()
    for name, problem in (("one", "no snapshot 'one'"), ("", "must"), ("..", "must")):
        with pytest.raises(SnapshotError, match=problem):
            store.remove(name)


# -- a VM from it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more", [{"memory_mib": 64}, {"cmdline": ("x",)}, {"rootfs": Path("/r")}, {"net": "user"}]
)
def test_what_comes_with_a_snapshot_is_not_asked_for(more: dict[str, Any]) -> None:
    with pytest.raises(InvalidVmConfig, match=f"{next(iter(more))} comes with the snapshot"):
        VmConfig(snapshot=Path("/s"), **more)


def test_the_guest_is_the_snapshots_and_the_rest_its_own() -> None:
    asked = VmConfig(
        name="two", snapshot=Path("/s"), qmp_path=Path("/q"), boot_timeout=3.0, vsock="vhost-user"
    )
    assert VmConfig.from_json(asked.to_json()) == asked
    config = restoring.settled(asked, saved())
    assert (config.name, config.memory_mib, config.mac) == ("two", 300, "52:54:00:00:00:01")
    assert (config.image, config.accel, config.snapshot) == (Path("/images/one"), "tcg", None)
    assert (config.qmp_path, config.boot_timeout, config.vsock) == (Path("/q"), 3.0, "vhost-user")
    assert restoring.settled(replace(asked, image=Path("/other")), saved()).image == Path("/other")


def another(tmp_path: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=tmp_path))


def test_each_vm_writes_to_a_copy_of_its_own(tmp_path: Path) -> None:
    """A disk that stays where it is must be what it was; one that only the saved VM had came along."""
    there, scratch = tmp_path / "there", another(tmp_path)
    (there / "disks").mkdir(parents=True)
    for name in ("data", "root"):
        (there / "disks" / name).write_text(name)
    shared = tmp_path / "shared"
    shared.write_text("shared")
    stat = shared.stat()
    record = saved(
        SavedDisk("root", "erofs", "/gone", True, True),
        SavedDisk("shared", "ext4", str(shared), True, False, stat.st_size, stat.st_mtime_ns),
        SavedDisk("Data", "", "/gone", False, True, port="plug3"),
    )
    (there / "disks" / "data").rename(there / "disks" / "Data")
    found = asyncio.run(restoring.disks(record, there, scratch))
    assert found == {"root": scratch / "root", "shared": shared, "Data": scratch / "Data"}
    (scratch / "Data").write_text("written to")
    assert (there / "disks" / "Data").read_text() == "data"
    assert restoring.booted(record, found) == (
        Disk(scratch / "root", "root", "erofs"),
        Disk(shared, "shared", "ext4"),
    )
    words = restoring.plugged(replace(record, nics=(SavedNic("52:54:00:00:00:02", "plug0"),)), found)
    devices = [
        json.loads(word) for option, word in zip(words[::2], words[1::2], strict=True) if option == "-device"
    ]
    assert [(each["id"], each["bus"]) for each in devices] == [
        ("disk-Data", "plug3"),
        ("nic-525400000002", "plug0"),
    ]
    shared.write_text("changed")
    with pytest.raises(SnapshotError, match="has changed since"):
        asyncio.run(restoring.disks(record, there, another(tmp_path)))
    shared.unlink()
    with pytest.raises(SnapshotError, match="No such file"):
        asyncio.run(restoring.disks(record, there, another(tmp_path)))


def test_a_disk_that_cannot_be_copied(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match=r"cannot copy .*No such file"):
        asyncio.run(copy(tmp_path / "none", tmp_path / "copy"))


def test_what_killed_ones_have_left_of_a_snapshot_goes_with_the_next_attempt(tmp_path: Path) -> None:
    """A guest's memory, gigabytes of it and as secret as the guest."""
    left = [tmp_path / f".new-nightly-{os.getpid()}", tmp_path / ".old-nightly-7"]
    others = [tmp_path / ".new-nightly", tmp_path / ".new-weekly-8", tmp_path / ".new-nightly-x"]
    for path in (*left, *others):
        path.mkdir()
        (path / "memory").write_bytes(b"secret")
    at_work = tmp_path / ".new-nightly-9"
    at_work.mkdir()
    with snapshotdir.held(at_work):
        new = saving._make(tmp_path / "nightly")
        assert os.listdir(new) == ["disks"]
        assert new.stat().st_mode & 0o777 == 0o700
        assert set(tmp_path.iterdir()) == {new, at_work, *others}


def test_a_snapshot_that_is_damaged_or_vanishes_does_not_hide_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    store = SnapshotStore()
    for name in ("good", "broken", "removed"):
        (store.root / name).mkdir(parents=True)
    saved().write(store.root / "good")
    (store.root / "broken" / "snapshot.json").write_text("{")
    args = parser.parse(["vm", "snapshot", "ls"])
    assert asyncio.run(args.handler(args)) == 125
    shown = capsys.readouterr()
    assert [line.split()[0] for line in shown.out.splitlines()] == ["SNAPSHOT", "good"]
    assert "snapshot.json is damaged" in shown.err
    assert "removed" not in shown.err
