"""Images kept by digest: made once, by one, whole or not at all."""

from __future__ import annotations

import asyncio
import os
import stat
import threading
from pathlib import Path

import pytest

from gcsagent.host.image.cache import Entry, Form, ImageCache
from gcsagent.host.image.errors import Ambiguous, Busy, ImageError, NotFound, Refused
from gcsagent.host.image.limits import Limits
from tests.cases.image_files import Layout, directory, docker_archive, file, tar

LAYER = tar(directory("bin"), file("bin/tool", "tool", mode=0o755), *(file(f"f{n}") for n in range(50)))
SECONDS = 30.0


class Progress:
    """Counts what is told. ``hold`` stops the first one that unpacks until it is released."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.begun, self.unpacking = threading.Event(), threading.Event()
        self.released = threading.Event()
        self.released.set()

    def __call__(self, what: str, _done: int, _size: int) -> None:
        if what not in self.told:
            self.told.append(what)
        self.begun.set()
        if what.startswith("unpacking"):
            self.unpacking.set()
            assert self.released.wait(SECONDS)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout(tmp_path / "layout")
    made.image(LAYER, tag="1", config={"created": "2020-01-02T03:04:05Z"})
    return made


@pytest.fixture
def cache(tmp_path: Path) -> ImageCache:
    return ImageCache(tmp_path / "images", Limits())


def prepare(cache: ImageCache, image: object, form: Form = Form.TREE) -> tuple[Entry, Path, Progress]:
    progress = Progress()
    entry, path = asyncio.run(cache.prepare(str(image), form, progress))
    return entry, path, progress


def test_an_image_is_unpacked_once(cache: ImageCache, layout: Layout, tmp_path: Path) -> None:
    entry, path, progress = prepare(cache, f"{layout.root}:1")
    assert progress.told == ["unpacking layer 1 of 1"]
    assert (path / "bin" / "tool").read_text() == "tool"
    assert path == cache.root / f"{entry.ident[7:]}.rootfs"
    assert stat.S_IMODE(cache.root.stat().st_mode) == 0o700
    for other in (layout.root, layout.as_tar(tmp_path / "tar"), entry.ident[7:19], "1"):
        again, found, quiet = prepare(cache, other)
        assert (again, found, quiet.told) == (entry, path, [])
    assert cache.entries() == [entry]


def test_a_disk_is_made_of_what_is_there_and_always_the_same(
    cache: ImageCache, layout: Layout, tmp_path: Path
) -> None:
    prepare(cache, layout.root)
    entry, disk, progress = prepare(cache, layout.root, Form.DISK)
    assert progress.told == ["writing it as a disk"]
    assert entry.forms == (Form.DISK, Form.TREE)
    other = ImageCache(tmp_path / "other", Limits())
    entry, again, progress = prepare(other, layout.root, Form.DISK)
    assert progress.told == ["unpacking layer 1 of 1", "writing it as a disk"]
    assert entry.forms == (Form.DISK,)
    assert disk.read_bytes() == again.read_bytes()
    assert sorted(os.listdir(other.root)) == [f"{entry.ident[7:]}.erofs", f"{entry.ident[7:]}.json"]
    layout.root.rename(tmp_path / "gone")
    with pytest.raises(NotFound, match="as a disk only"):
        prepare(other, entry.ident)


def test_those_who_come_at_once_wait_for_the_first(cache: ImageCache, layout: Layout) -> None:
    progress = [Progress() for _ in range(4)]
    progress[0].released.clear()

    async def story() -> None:
        async with asyncio.timeout(SECONDS), asyncio.TaskGroup() as tasks:
            work = [tasks.create_task(cache.prepare(str(layout.root), Form.TREE, progress[0]))]
            assert await asyncio.to_thread(progress[0].unpacking.wait, SECONDS)
            for each in progress[1:]:
                work.append(tasks.create_task(cache.prepare(str(layout.root), Form.TREE, each)))
                assert await asyncio.to_thread(each.begun.wait, SECONDS)
            progress[0].released.set()
        assert len({task.result()[1] for task in work}) == 1

    asyncio.run(story())
    assert [each.told for each in progress[1:]] == [["waiting for another gcsctl"]] * 3


def test_what_fails_or_is_interrupted_leaves_nothing(cache: ImageCache, tmp_path: Path) -> None:
    hostile = Layout(tmp_path / "hostile")
    hostile.image(LAYER, tar(file("../x")))
    with pytest.raises(Refused):
        prepare(cache, hostile.root)
    assert os.listdir(cache.root) == []
    whole = docker_archive(tmp_path / "tar", LAYER)
    progress = Progress()
    progress.released.clear()

    async def story() -> None:
        work = asyncio.create_task(cache.prepare(str(whole), Form.TREE, progress))
        assert await asyncio.to_thread(progress.unpacking.wait, SECONDS)
        work.cancel()
        progress.released.set()
        with pytest.raises(asyncio.CancelledError):
            await work

    asyncio.run(story())
    assert os.listdir(cache.root) == []
    prepare(cache, whole)


def test_what_was_killed_is_cleared_away(cache: ImageCache, layout: Layout) -> None:
    """A directory in the making that nobody holds, of this image and of another."""
    entry, path, _ = prepare(cache, layout.root)
    for ident in (entry.ident[7:], "0" * 64):
        left = cache.root / f".new-{ident}" / "tree" / "bin"
        left.mkdir(parents=True)
        (left / "half").write_text("half")
    (cache.root / f"{entry.ident[7:]}.json").unlink()  # killed between the last two steps
    _, again, progress = prepare(cache, layout.root)
    assert (again, progress.told) == (path, ["unpacking layer 1 of 1"])
    assert sorted(os.listdir(cache.root)) == [f"{entry.ident[7:]}.json", f"{entry.ident[7:]}.rootfs"]


@pytest.mark.parametrize("damage", ["", "{", '{"config": "{}", "names": [], "size": 1}'])
def test_a_damaged_record_is_no_image_and_is_made_anew(
    cache: ImageCache, layout: Layout, damage: str
) -> None:
    entry, path, _ = prepare(cache, layout.root)
    (cache.root / f"{entry.ident[7:]}.json").write_text(damage)
    assert cache.entries() == []
    again, found, progress = prepare(cache, layout.root)
    assert (again, found, progress.told) == (entry, path, ["unpacking layer 1 of 1"])


def test_images_are_found_by_id_and_name_and_removed(
    cache: ImageCache, layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _, _ = prepare(cache, layout.root)
    two, path, _ = prepare(cache, docker_archive(tmp_path / "tar", tar(file("x")), tags=("host/app:1",)))
    assert cache.find("host/app:1") == cache.find("app:1") == cache.find(two.ident) == two
    with pytest.raises(Ambiguous, match="several"):
        cache.find("1")
    for text in (one.ident[7:12], "nothing", "nothing:1"):
        with pytest.raises(NotFound, match="image ls"):
            cache.find(text)
    read_text = Path.read_text
    mounts = f"1 2 0:3 / /x rw - overlay overlay rw,lowerdir={path},upperdir=/u,workdir=/w\n"
    monkeypatch.setattr(Path, "read_text", lambda self, **more: mounts)
    with pytest.raises(Busy, match="delete them first"):
        asyncio.run(cache.remove(two))
    monkeypatch.setattr(Path, "read_text", read_text)
    asyncio.run(cache.remove(two))
    assert cache.entries() == [one]
    assert not path.exists()
    asyncio.run(cache.remove(one))
    assert os.listdir(cache.root) == []


def test_a_cache_that_cannot_be_made_is_told(tmp_path: Path, layout: Layout) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ImageError, match="GCS_CACHE"):
        prepare(ImageCache(tmp_path / "file" / "images", Limits()), layout.root)
