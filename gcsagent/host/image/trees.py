"""Layers over each other in one tree, with what they say is gone from those below taken away.

Whiteouts: OCI Image Format Specification, layer.md. ``.wh.NAME`` takes NAME away, ``.wh..wh..opq`` all that
is in its directory, and either only what layers below have put there, wherever in the layer it comes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from gcsagent.host.image.errors import CannotUnpack, ImageError, Refused, TooLarge
from gcsagent.host.image.images import Image
from gcsagent.host.image.layers import unpacked
from gcsagent.host.image.limits import Limits, Meter
from gcsagent.tarball import attributes
from gcsagent.tarball.attributes import Keep
from gcsagent.tarball.errors import ArchiveError, damaged
from gcsagent.tarball.source import Source
from gcsagent.tarball.tree import Tree
from gcsagent.tarball.unpack import Rules, Unpacker
from protocol.errors import Code

WHITEOUT = ".wh."
OPAQUE = ".wh..wh..opq"
_RESERVED = ".wh..wh."
"""aufs' own files, which old images have; they mean nothing elsewhere (layer.md leaves them reserved)."""

Progress = Callable[[str, int, int], None]
"""What is done, how many bytes of it, of how many. May raise, which ends it."""

ROOT_MODE = 0o755


def unpack(image: Image, root: Path, limits: Limits, progress: Progress) -> None:
    """All layers of ``image`` into the empty directory ``root``. After an ImageError, what is there stays."""
    meter = Meter(limits)
    root.chmod(ROOT_MODE)
    os.utime(root, (0, 0))
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for number, layer in enumerate(image.layers, 1):
            done = meter.packed
            what = f"unpacking layer {number} of {len(image.layers)}"

            def tick(_count: int, what: str = what, done: int = done, size: int = layer.size) -> None:
                progress(what, meter.packed - done, size)

            with unpacked(image, layer, meter, tick) as content:
                _apply(fd, Source(content.read), meter)
                content.check()
    except ArchiveError as error:
        raise _as_image_error(error) from error
    except OSError as error:
        raise CannotUnpack(f"the image cannot be unpacked to {root.parent}: {error.strerror}") from error
    finally:
        os.close(fd)


def _apply(root: int, source: Source, meter: Meter) -> None:
    limits, trusted = meter.limits, os.geteuid() == 0
    rules = Rules(
        keep=Keep() if trusted else Keep(owner=False, xattrs=("user.",)),
        special=trusted,
        pass_over=True,
        max_entries=limits.max_entries - meter.entries,
        update=True,
        through_own=True,
    )
    tree = Tree(root)
    layer = _LayerOver(tree, root, meter, trusted, os.fstat(root).st_mtime_ns)
    unpacker = Unpacker(tree, [], rules, before=layer.before)
    layer.removed = unpacker.forget_parent
    try:
        unpacker.run(source)
    finally:
        meter.entries += unpacker.tally.entries
        layer.finish(rules.keep)


@dataclass(slots=True)
class _LayerOver:
    """What one layer does to those below it, before its own members are unpacked.

    ``made`` are the real paths of its members so far, which its own whiteouts do not touch; ``hidden`` are
    those of its whiteouts, of which a second one has nothing left to do.
    """

    tree: Tree
    root: int
    meter: Meter
    trusted: bool
    root_time: int
    removed: Callable[[], None] = lambda: None
    made: set[str] = field(default_factory=set)
    hidden: set[str] = field(default_factory=set)
    _top: tarfile.TarInfo | None = None
    _above: tuple[list[str], str | None] = ([], None)

    def before(self, member: tarfile.TarInfo, parts: list[str]) -> bool:
        """Whether ``member`` is one to unpack. Raises ArchiveError, TooLarge, OSError."""
        if member.isreg():
            self.meter.add_file(member.size)
        if not self.trusted:
            member.mode |= 0o700 if member.isdir() else 0o600
        if not parts:
            if not member.isdir():
                raise damaged("its root is no directory")
            self._top = member
            return False
        if any(part.startswith(WHITEOUT) for part in parts[:-1]):
            return False
        name = parts[-1]
        if name.startswith(WHITEOUT):
            self._whiteout(parts[:-1], name)
            return False
        self._make_room(member, parts)
        return True

    def finish(self, keep: Keep) -> None:
        """The root directory's own attributes; the same image shall always make the same tree."""
        os.utime(self.root, ns=(self.root_time, self.root_time))
        if self._top is not None:
            attributes.give(self.root, self._top, keep)

    # -- whiteouts --------------------------------------------------------------------------------

    def _whiteout(self, above: list[str], name: str) -> None:
        target = name.removeprefix(WHITEOUT)
        if target in ("", ".", ".."):
            raise damaged(f"{name!r} hides nothing that could be")
        if name.startswith(_RESERVED) and name != OPAQUE:
            return
        try:
            fd, real = self.tree.trail(above)
        except (FileNotFoundError, NotADirectoryError):
            return
        try:
            path = "/".join([*real, name])
            if path in self.hidden:
                return
            self.hidden.add(path)
            before = os.fstat(fd)
            if not stat.S_ISDIR(before.st_mode):
                return
            for entry in _names(fd) if name == OPAQUE else [target]:
                self._remove(fd, entry, "/".join([*real, entry]))
            os.utime(f"/proc/self/fd/{fd}", ns=(before.st_atime_ns, before.st_mtime_ns))
        finally:
            os.close(fd)
            self._forget()

    def _remove(self, parent: int, name: str, path: str, *, own: bool = False) -> bool:
        """Takes away what this layer has not made itself, or that as well; returns whether all of it went."""
        mine = path in self.made and not own
        try:
            info = os.stat(name, dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            return True
        if not stat.S_ISDIR(info.st_mode):
            if not mine:
                os.unlink(name, dir_fd=parent)
            return not mine
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        try:
            gone = [self._remove(fd, entry, f"{path}/{entry}", own=own) for entry in os.listdir(fd)]
        finally:
            os.close(fd)
        if mine or not all(gone):
            return False
        os.rmdir(name, dir_fd=parent)
        return True

    # -- members ----------------------------------------------------------------------------------

    def _make_room(self, member: tarfile.TarInfo, parts: list[str]) -> None:
        """A directory and what is none replace each other; else the unpacker knows what to do."""
        path = f"{self._real(parts[:-1])}/{parts[-1]}".lstrip("/")
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            fd = self.tree.lookup(parts[:-1])
            try:
                info = os.stat(parts[-1], dir_fd=fd, follow_symlinks=False)
                if stat.S_ISDIR(info.st_mode) != member.isdir():
                    self._remove(fd, parts[-1], path, own=True)
                    self._forget()
            finally:
                os.close(fd)
        self.made.add(path)

    def _real(self, above: list[str]) -> str:
        """The way to a directory without symlinks; as it is given, where it is yet to be made."""
        known, real = self._above
        if real is None or known != above:
            real = "/".join(above)
            with contextlib.suppress(OSError):
                fd, names = self.tree.trail(above)
                os.close(fd)
                real = "/".join(names)
            self._above = (above, real)
        return real

    def _forget(self) -> None:
        self._above = ([], None)
        self.removed()


def _names(directory: int) -> list[str]:
    fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
    try:
        return os.listdir(fd)
    finally:
        os.close(fd)


def _as_image_error(error: ArchiveError) -> ImageError:
    text = error.message
    if error.field in ("max_entries", "max_bytes"):
        return TooLarge(f"the image's layers have too much in them: {text.removesuffix('; allow more')}")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CannotUnpack(f"no space is left to unpack the image: {text}; make room, or set GCS_CACHE")
    if error.errno in (errno.EPERM, errno.EACCES):
        return CannotUnpack(f"this user may not make what the image has: {text}")
    if error.code is Code.INVALID_ARGUMENT or error.errno:
        return Refused(f"a layer of the image cannot be taken: {text}")
    return CannotUnpack(f"the image cannot be unpacked: {text}")
