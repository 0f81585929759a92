"""An archive into a directory tree, believing nothing of it.

A file comes into being without a name, or under a temporary one beside its own, and gets its own when it is
whole: whatever is cut off, nothing half is left under it. What was in its place is replaced at once. A
directory that exists already stays as it is, and so does a symlink to one, unless the archive made it.
What came before a fault stays.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field

from gcsagent.tarball import attributes
from gcsagent.tarball.attributes import Keep
from gcsagent.tarball.errors import ArchiveError, at, damaged, shown
from gcsagent.tarball.members import MAX_SIZE, members
from gcsagent.tarball.source import Source
from gcsagent.tarball.tree import Tree, split
from protocol.errors import Code

TEMPORARY = ".gcs-put-"
MAX_ENTRIES = 10_000_000
MAX_DEPTH = 512
"""Directories below each other: each takes a descriptor while a name is looked up."""


@dataclass(slots=True)
class Tally:
    """``skipped``: extended attributes (and, packing, sockets and what vanished) that were left out."""

    entries: int = 0
    skipped: int = 0


@dataclass(frozen=True, slots=True)
class Rules:
    """``name``: the archive's one top-level entry, to be called ``rename`` here, if given.

    ``special``: devices and fifos may be made; with ``pass_over`` they are left out instead of refused.
    ``max_bytes`` also bounds how large holes make a file. ``update``: directories that are there already get
    the archive's attributes. ``through_own``: names may lead through symlinks that the archive has made.
    """

    keep: Keep = Keep()
    name: str = ""
    rename: str = ""
    special: bool = False
    pass_over: bool = False
    max_entries: int = MAX_ENTRIES
    max_bytes: int | None = None
    update: bool = False
    through_own: bool = False


@dataclass(slots=True)
class _Directory:
    member: tarfile.TarInfo
    parts: list[str]
    identity: tuple[int, int]


@dataclass(slots=True)
class Unpacker:
    """``base`` are the names of the directory that the archive goes to, from the tree's root on.

    ``first`` is shown the first member, and may change where it all goes before that is unpacked; ``before``
    is shown each, with its names from the tree's root on, and says whether it is to be unpacked; ``note`` is
    told the path of a temporary name before it is made, and "" when it is gone.
    """

    tree: Tree
    base: list[str]
    rules: Rules = Rules()
    first: Callable[[Unpacker, tarfile.TarInfo], None] = lambda _unpacker, _member: None
    before: Callable[[tarfile.TarInfo, list[str]], bool] = lambda _member, _parts: True
    note: Callable[[str], None] = lambda _path: None
    tally: Tally = field(default_factory=Tally)
    progress: Callable[[str], None] = lambda _name: None
    _made: dict[tuple[int, int], _Directory] = field(default_factory=dict)
    _size: int = 0
    _parent: tuple[list[str], int] | None = None

    def run(self, source: Source) -> Tally:
        """Unpacks all of it. Raises ArchiveError, and what ``source`` raises."""
        try:
            self._members(source)
            source.drain()
        finally:
            self.forget_parent()
            self._finish_directories()
        return self.tally

    def _members(self, source: Source) -> None:
        for member, stored in members(source):
            if not self.tally.entries:
                self.first(self, member)
            self._count(member)
            self._member(source, member, stored)

    def _count(self, member: tarfile.TarInfo) -> None:
        self.tally.entries += 1
        if self.tally.entries > self.rules.max_entries:
            raise ArchiveError(
                Code.RESOURCE_EXHAUSTED,
                f"the archive has more than {self.rules.max_entries} entries; allow more",
                field="max_entries",
            )
        if not 0 <= member.size <= MAX_SIZE:  # a pax record may say anything, and less than nothing adds room
            raise damaged(f"{shown(member.name)} claims a size that no file has")
        self._size += member.size if member.isreg() else 0
        if self.rules.max_bytes is not None and self._size > self.rules.max_bytes:
            raise ArchiveError(
                Code.RESOURCE_EXHAUSTED,
                f"the files in the archive have more than {self.rules.max_bytes} bytes; allow more",
                field="max_bytes",
            )
        self.progress(member.name)

    def _member(self, source: Source, member: tarfile.TarInfo, stored: int) -> None:
        parts = self._parts(member.name)
        try:
            if not self.before(member, parts):
                return
            if member.isdir():
                self._directory(member, parts)
            elif member.isreg():
                self._file(source, member, stored, parts)
            elif member.islnk():
                self._hard_link(member, parts)
            elif member.issym():
                self._symlink(member, parts)
            elif member.type in (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE):
                self._special(member, parts)
            else:
                raise damaged(f"{shown(member.name)} is of a kind that is not known here")
        except OSError as error:
            raise at(member.name, error) from error

    # -- names ------------------------------------------------------------------------------------

    def _parts(self, name: str) -> list[str]:
        """From the tree's root on. Names that begin with a slash are taken as tar takes them: without."""
        parts = split(name)
        if ".." in parts:
            raise damaged(f"{shown(name)} leads upwards")
        if "\0" in name:
            raise damaged(f"{shown(name)} is no file's name")
        if len(parts) > MAX_DEPTH:
            raise damaged(f"{shown(name)} is more than {MAX_DEPTH} directories deep")
        if self.rules.name:
            if not parts or parts[0] != self.rules.name:
                raise damaged(f"{shown(name)} is not in {shown(self.rules.name)}, which was announced")
            parts[0] = self.rules.rename
        return [*self.base, *parts]

    def _in_parent(self, parts: list[str]) -> tuple[int, str]:
        """The directory that the last of ``parts`` is to be in, its missing parents made, and that name."""
        above, name = parts[:-1], parts[-1]
        if self._parent is None or self._parent[0] != above:
            self.forget_parent()
            self._parent = (above, self.tree.directory(above, make=True))
        return self._parent[1], name

    def forget_parent(self) -> None:
        """To be called when directories have been removed in which something may have been unpacked."""
        if self._parent is not None:
            os.close(self._parent[1])
            self._parent = None

    # -- kinds ------------------------------------------------------------------------------------

    def _directory(self, member: tarfile.TarInfo, parts: list[str]) -> None:
        if len(parts) == len(self.base):
            return  # "./", where it all goes, which is there
        parent, name = self._in_parent(parts)
        try:
            os.mkdir(name, 0o700, dir_fd=parent)
        except FileExistsError:
            os.close(self.tree.directory(parts))
            if not self.rules.update:
                return
        info = os.stat(name, dir_fd=parent, follow_symlinks=False)
        identity = info.st_dev, info.st_ino
        self._made[identity] = _Directory(member, parts, identity)

    def _finish_directories(self) -> None:
        """Their own attributes come last: what is made in them changes their time, and may need room."""
        while self._made:
            _, made = self._made.popitem()
            with contextlib.suppress(OSError, ArchiveError):  # somebody has moved it: it is theirs now
                self._finish_directory(made)

    def _finish_directory(self, made: _Directory) -> None:
        parent = self.tree.directory(made.parts[:-1])
        try:
            fd = os.open(
                made.parts[-1], os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent
            )
        finally:
            os.close(parent)
        try:
            info = os.fstat(fd)
            if (info.st_dev, info.st_ino) == made.identity:
                self.tally.skipped += attributes.give(fd, made.member, self.rules.keep)
        finally:
            os.close(fd)

    def _file(self, source: Source, member: tarfile.TarInfo, stored: int, parts: list[str]) -> None:
        self._check_named(member, parts)
        parent, name = self._in_parent(parts)
        fd, temporary = self._nameless(parent, parts)
        try:
            self._fill(fd, source, member, stored)
            self.tally.skipped += attributes.give(fd, member, self.rules.keep)
            if temporary:
                self._rename(parent, temporary, name)
                temporary = ""
            else:
                self._name(fd, parent, name, parts)
        except BaseException:
            if temporary:
                self._discard(parent, temporary)
            raise
        finally:
            os.close(fd)

    def _check_named(self, member: tarfile.TarInfo, parts: list[str]) -> None:
        if len(parts) == len(self.base):
            raise damaged(f"{shown(member.name)} is no directory, but is to be where it all goes")

    def _nameless(self, parent: int, parts: list[str]) -> tuple[int, str]:
        """A new file in ``parent``, and the temporary name it has if the file system cannot do without."""
        try:
            return os.open(".", os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600, dir_fd=parent), ""
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT):
                raise
        temporary = self._temporary(parts)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(temporary, flags, 0o600, dir_fd=parent), temporary

    def _name(self, fd: int, parent: int, name: str, parts: list[str]) -> None:
        """Gives a file that has none its name: link(2) of what /proc shows for it (open(2), O_TMPFILE)."""
        made = f"/proc/self/fd/{fd}"
        try:
            os.link(made, name, dst_dir_fd=parent, follow_symlinks=True)
            return
        except FileExistsError:
            pass
        temporary = self._temporary(parts)
        os.link(made, temporary, dst_dir_fd=parent, follow_symlinks=True)
        self._rename_or_discard(parent, temporary, name)

    def _fill(self, fd: int, source: Source, member: tarfile.TarInfo, stored: int) -> None:
        holes = getattr(member, "sparse", None)
        pieces = [(0, member.size)] if holes is None else _checked(member, holes, stored)
        for offset, size in pieces:
            if offset:
                os.lseek(fd, offset, os.SEEK_SET)
            while size:
                data = source.exactly(size)
                size -= len(data)
                while data:
                    data = data[os.write(fd, data) :]
        if holes is not None:
            os.ftruncate(fd, member.size)

    def _hard_link(self, member: tarfile.TarInfo, parts: list[str]) -> None:
        self._check_named(member, parts)
        target = self._parts(member.linkname)
        if len(target) == len(self.base):
            raise damaged(f"{shown(member.name)} is a hard link to a directory")
        source = self.tree.directory(target[:-1])
        try:
            parent, name = self._in_parent(parts)
            temporary = self._temporary(parts)
            os.link(target[-1], temporary, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)
        finally:
            os.close(source)
        self._rename_or_discard(parent, temporary, name)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=parent)  # rename(2) leaves both names of one file alone

    def _symlink(self, member: tarfile.TarInfo, parts: list[str]) -> None:
        if "\0" in member.linkname:
            raise damaged(f"{shown(member.name)} leads to what is no file's name")

        def make(parent: int, temporary: str) -> None:
            os.symlink(member.linkname, temporary, dir_fd=parent)
            info = os.stat(temporary, dir_fd=parent, follow_symlinks=False)
            if not self.rules.through_own:
                self.tree.barred.add((info.st_dev, info.st_ino))

        self._make(member, parts, make)

    def _special(self, member: tarfile.TarInfo, parts: list[str]) -> None:
        if self.rules.pass_over and not self.rules.special:
            self.tally.skipped += 1
            return
        if not self.rules.special:
            raise ArchiveError(
                Code.INVALID_ARGUMENT,
                f"the archive: {shown(member.name)} is a device or fifo; allow them with 'special'",
                field="special",
            )
        kind = {tarfile.CHRTYPE: stat.S_IFCHR, tarfile.BLKTYPE: stat.S_IFBLK}.get(member.type, stat.S_IFIFO)
        numbers = (member.devmajor, member.devminor)
        if not (0 <= numbers[0] < 1 << 12 and 0 <= numbers[1] < 1 << 20):
            raise damaged(f"{shown(member.name)} has numbers of no device")
        device = 0 if kind == stat.S_IFIFO else os.makedev(*numbers)
        mode = kind | attributes.mode_of(member, self.rules.keep)
        self._make(member, parts, lambda parent, name: _mknod(parent, name, mode, device))

    def _make(self, member: tarfile.TarInfo, parts: list[str], make: Callable[[int, str], None]) -> None:
        self._check_named(member, parts)
        parent, name = self._in_parent(parts)
        temporary = self._temporary(parts)
        try:
            make(parent, temporary)
            self.tally.skipped += attributes.give_named(parent, temporary, member, self.rules.keep)
        except BaseException:
            self._discard(parent, temporary)
            raise
        self._rename_or_discard(parent, temporary, name)

    # -- temporary names --------------------------------------------------------------------------

    def _temporary(self, parts: list[str]) -> str:
        name = TEMPORARY + secrets.token_hex(8)
        self.note("/".join([*parts[:-1], name]))
        return name

    def _rename(self, parent: int, temporary: str, name: str) -> None:
        os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
        self.note("")

    def _rename_or_discard(self, parent: int, temporary: str, name: str) -> None:
        try:
            self._rename(parent, temporary, name)
        except BaseException:
            self._discard(parent, temporary)
            raise

    def _discard(self, parent: int, temporary: str) -> None:
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=parent)
        self.note("")


def _mknod(parent: int, name: str, mode: int, device: int) -> None:
    mask = os.umask(0)
    try:
        os.mknod(name, mode, device, dir_fd=parent)
    finally:
        os.umask(mask)


def _checked(member: tarfile.TarInfo, holes: list[tuple[int, int]], stored: int) -> list[tuple[int, int]]:
    """The pieces of a file with holes, which must be in order, in the file, and in the archive."""
    end = 0
    for offset, size in holes:
        if offset < end or size < 0 or offset + size > member.size:
            raise damaged(f"{shown(member.name)} has holes that contradict each other")
        end = offset + size
    if sum(size for _, size in holes) > stored:
        raise damaged(f"{shown(member.name)} has holes that contradict its size")
    return holes
