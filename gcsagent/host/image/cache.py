"""Images that have been unpacked, kept by digest below the cache directory.

    CACHE/images/DIGEST.json      what the image says of itself, written last: what has none is not there
    CACHE/images/DIGEST.erofs     its file system as a disk, for VMs
    CACHE/images/DIGEST.rootfs/   the same as files, for an agent on this machine
    CACHE/images/.new-DIGEST/     one of them in the making, locked by whoever makes it

DIGEST is that of the image's config, which lists its layers' digests: the same image from another file, or
packed otherwise, is the same. What a killed gcsctl has left in the making is removed by the next one.
The directory is nobody else's to enter: what is unpacked in it may be set-uid, or a device.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import fcntl
import json
import os
import shutil
import threading
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from gcsagent.host.image import documents, images, trees
from gcsagent.host.image.documents import Config
from gcsagent.host.image.errors import Ambiguous, Busy, CannotUnpack, Damaged, NoFile, NotFound
from gcsagent.host.image.images import Image
from gcsagent.host.image.limits import Limits
from gcsagent.host.image.locks import lock
from gcsagent.host.image.reference import answers_to
from gcsagent.host.image.trees import Progress
from gcsagent.host.vm.disk import make_erofs
from gcsagent.host.vm.tools import cache_dir

_NEW = ".new-"
_WAIT_SECONDS = 1800.0
_SHORTEST = 6
_FAR = 4102444800
"""2100-01-01: no file of an image that does not say when it was made is newer than this."""
_OLD = 631152000
"""1990-01-01: who says an image was made before this does not mean it."""


class Form(StrEnum):
    """What an image is kept as; the values are the suffixes of its files."""

    DISK = "erofs"
    TREE = "rootfs"


@dataclass(frozen=True, slots=True)
class Entry:
    """A cached image. ``size`` is that of its compressed layers, ``forms`` what it is kept as."""

    ident: str
    names: tuple[str, ...]
    config: Config
    size: int
    forms: tuple[Form, ...]


class _Stopped(Exception):
    pass


class ImageCache:
    """``root`` is the directory described above; it is made when first needed."""

    def __init__(self, root: Path | None = None, limits: Limits | None = None) -> None:
        """Raises ImageError for limits in the environment that are none."""
        self.root = root or cache_dir() / "images"
        self.limits = limits or Limits.from_env()

    # -- what is there ----------------------------------------------------------------------------

    def path(self, ident: str, form: Form) -> Path:
        return self.root / f"{_hex(ident)}.{form}"

    def entries(self) -> list[Entry]:
        """Without those that cannot be read."""
        found = []
        for record in sorted(self.root.glob("*.json")):
            with contextlib.suppress(Damaged, NotFound):
                found.append(self._read(record))
        return found

    def find(self, text: str) -> Entry:
        """By its digest or the beginning of it, or by a name it had. Raises NotFound, Ambiguous."""
        wanted = text.removeprefix("sha256:")
        entries = self.entries()
        found = [
            each for each in entries if len(wanted) >= _SHORTEST and _hex(each.ident).startswith(wanted)
        ] or [each for each in entries if answers_to(each.names, text)]
        if not found:
            raise NotFound(f"{text}: neither a file nor an image in the cache; `gcsctl image ls` lists those")
        if len(found) > 1:
            raise Ambiguous(f"{text}: several cached images are meant: {', '.join(e.ident for e in found)}")
        return found[0]

    # -- making -----------------------------------------------------------------------------------

    async def prepare(self, text: str, form: Form, progress: Progress) -> tuple[Entry, Path]:
        """The image that ``text`` (PATH[:TAG], or one in the cache) means, kept as ``form``, and where.

        Raises ImageError, VmError, OSError. What is interrupted leaves nothing.
        """
        try:
            with images.opened(text, self.limits) as image:
                return await self._prepare(image, form, progress)
        except NoFile:
            entry = self.find(text)
        if form not in entry.forms:
            async with self._claimed(entry.ident, progress) as place:
                await self._disk(entry, self.path(entry.ident, Form.TREE), place, progress)
            entry = self.find(entry.ident)
        return entry, self.path(entry.ident, form)

    async def _prepare(self, image: Image, form: Form, progress: Progress) -> tuple[Entry, Path]:
        path = self.path(image.ident, form)
        if not self._has(image.ident, form):
            async with self._claimed(image.ident, progress) as place:
                if not self._has(image.ident, form):
                    await self._make(image, form, place, progress)
        return self._read(self._record(image.ident)), path

    async def _make(self, image: Image, form: Form, place: Path, progress: Progress) -> None:
        tree = self.path(image.ident, Form.TREE)
        if not self._has(image.ident, Form.TREE):
            tree = place / "tree"
            tree.mkdir()
            await _in_thread(lambda tick: trees.unpack(image, tree, self.limits, tick), progress)
        if form is Form.DISK:
            await self._disk(_described(image), tree, place, progress)
        else:
            _replace_directory(tree, self.path(image.ident, form))
        self._write(image, place)

    async def _disk(self, entry: Entry, tree: Path, place: Path, progress: Progress) -> None:
        if not tree.is_dir():
            raise NotFound(
                f"image {entry.ident} is in the cache as a disk only; name its file to have it unpacked"
            )
        progress("writing it as a disk", 0, 0)
        disk = place / "disk"
        await make_erofs(tree, disk, stamp=(_stamp(entry.config.created), uuid.UUID(_hex(entry.ident)[:32])))
        _sync(disk)
        os.replace(disk, self.path(entry.ident, Form.DISK))

    @asynccontextmanager
    async def _claimed(self, ident: str, progress: Progress) -> AsyncIterator[Path]:
        """An empty directory of our own, and with it the right to change what is there of ``ident``."""
        self._make_root()
        await asyncio.to_thread(self.sweep)
        path = self.root / (_NEW + _hex(ident))
        fd = await _lock(path, lambda: progress("waiting for another gcsctl", 0, 0))
        try:
            await asyncio.to_thread(_empty, path)
            yield path
        finally:
            await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)
            os.close(fd)

    def sweep(self) -> None:
        """Removes what killed ones have left in the making."""
        for path in self.root.glob(f"{_NEW}*"):
            with contextlib.suppress(OSError):
                fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path, ignore_errors=True)
                finally:
                    os.close(fd)

    def _make_root(self) -> None:
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.root.chmod(0o700)
        except OSError as error:
            raise CannotUnpack(
                f"cannot use the cache {self.root}: {error.strerror}; set GCS_CACHE"
            ) from error

    # -- records ----------------------------------------------------------------------------------

    def _record(self, ident: str) -> Path:
        return self.root / f"{_hex(ident)}.json"

    def _has(self, ident: str, form: Form) -> bool:
        """A record that is damaged is written anew, with what it is of."""
        try:
            return form in self._read(self._record(ident)).forms
        except (Damaged, NotFound):
            return False

    def _read(self, record: Path) -> Entry:
        try:
            data: dict[str, Any] = json.loads(record.read_bytes())
            raw = str(data["config"]).encode()
            names, size = tuple(map(str, data["names"])), int(data["size"])
        except FileNotFoundError:
            raise NotFound(f"{record} is gone: somebody has removed the image") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Damaged(f"{record} is damaged ({error}); remove it") from error
        ident = documents.digest_of(raw)
        if _hex(ident) != record.stem:
            raise Damaged(f"{record} is not of the image its name says; remove it")
        forms = tuple(form for form in Form if self.path(ident, form).exists())
        return Entry(ident, names, documents.config(raw), size, forms)

    def _write(self, image: Image, place: Path) -> None:
        record = place / "record"
        document = {"names": image.names, "size": image.size, "config": image.raw_config.decode()}
        record.write_text(json.dumps(document, indent=1) + "\n")
        _sync(record)
        os.replace(record, self._record(image.ident))

    # -- removing ---------------------------------------------------------------------------------

    async def remove(self, entry: Entry) -> None:
        """Raises Busy while a container of this machine has it for its root."""
        async with self._claimed(entry.ident, lambda *_: None) as place:
            tree = self.path(entry.ident, Form.TREE)
            if _is_mounted(tree):
                raise Busy(f"containers have image {entry.ident} for their root; delete them first")
            self._record(entry.ident).unlink(missing_ok=True)
            self.path(entry.ident, Form.DISK).unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):
                tree.rename(place / "tree")


def _is_mounted(tree: Path) -> bool:
    """As a layer of an overlay, which is how containers have it (proc_pid_mountinfo(5))."""
    escaped = str(tree).replace(" ", "\\040")
    return f"lowerdir={escaped}" in Path("/proc/self/mountinfo").read_text(errors="surrogateescape")


def _described(image: Image) -> Entry:
    return Entry(image.ident, image.names, image.config, image.size, ())


def _hex(ident: str) -> str:
    return ident.partition(":")[2]


def _stamp(created: str) -> int:
    try:
        when = int(datetime.datetime.fromisoformat(created).timestamp())
    except (ValueError, OverflowError):
        return _FAR
    return when if _OLD <= when <= _FAR else _FAR


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _replace_directory(made: Path, path: Path) -> None:
    if path.exists():  # without a record beside it: its maker was killed before that
        path.rename(made.parent / "old")
    made.rename(path)


def _empty(path: Path) -> None:
    for each in path.iterdir():
        if each.is_dir() and not each.is_symlink():
            shutil.rmtree(each)
        else:
            each.unlink()


async def _lock(path: Path, waiting: Callable[[], None]) -> int:
    """Makes the directory ``path``, and holds it: whoever is done with it removes it first. Raises Busy."""

    def opened() -> int:
        path.mkdir(mode=0o700, exist_ok=True)
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)

    return await lock(opened, path, _WAIT_SECONDS, waiting)


async def _in_thread(work: Callable[[Progress], None], progress: Progress) -> None:
    """``work`` is given a progress that ends it when this task is cancelled; that is waited for."""
    stop = threading.Event()

    def tick(what: str, done: int, size: int) -> None:
        if stop.is_set():
            raise _Stopped
        progress(what, done, size)

    working = asyncio.ensure_future(asyncio.to_thread(work, tick))
    try:
        await asyncio.shield(working)
    except asyncio.CancelledError:
        stop.set()
        await asyncio.wait([working])
        with contextlib.suppress(Exception):
            working.result()
        raise
