"""A directory tree, or one file of it, as a tar archive in pax format.

What is in the tree may change meanwhile: a file that shrinks is filled up with zeros, one that is gone is
left out, a directory that has become a symlink is not followed. Files with holes are written as GNU tar 1.0
does, so that the holes stay holes.
"""

from __future__ import annotations

import errno
import os
import stat
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field

from gcsagent.tarball import attributes
from gcsagent.tarball.attributes import IdMap
from gcsagent.tarball.errors import ArchiveError, at, shown
from gcsagent.tarball.source import BLOCK, CHUNK
from gcsagent.tarball.tree import Tree, split
from gcsagent.tarball.unpack import MAX_DEPTH, MAX_ENTRIES, Tally
from protocol.errors import Code

RECORD = 20 * BLOCK
"""What an archive is a multiple of (tar(5))."""

MADE_UP = frozenset(
    (
        "proc",
        "sysfs",
        "cgroup",
        "cgroup2",
        "devpts",
        "mqueue",
        "debugfs",
        "tracefs",
        "securityfs",
        "pstore",
        "bpf",
        "configfs",
        "fusectl",
        "binfmt_misc",
        "efivarfs",
        "devtmpfs",
        "rpc_pipefs",
        "nsfs",
        "autofs",
    )
)
"""File systems whose files are the kernel's words of the moment: their directories come without contents."""

_KINDS = {
    stat.S_IFDIR: tarfile.DIRTYPE,
    stat.S_IFLNK: tarfile.SYMTYPE,
    stat.S_IFCHR: tarfile.CHRTYPE,
    stat.S_IFBLK: tarfile.BLKTYPE,
    stat.S_IFIFO: tarfile.FIFOTYPE,
}


@dataclass(frozen=True, slots=True)
class Choice:
    """``owner``: these ids instead of the files' own. ``special``: devices and fifos, too.

    ``made_up`` are the devices (st_dev) of file systems whose directories come without contents.
    """

    owner: tuple[int, int] | None = None
    special: bool = True
    xattrs: bool = True
    uids: IdMap = ()
    gids: IdMap = ()
    made_up: frozenset[int] = frozenset()
    max_entries: int = MAX_ENTRIES
    max_bytes: int | None = None


def made_up(mountinfo: str) -> frozenset[int]:
    """Those among the mounts of a proc_pid_mountinfo(5) file."""
    found = set()
    for line in mountinfo.split("\n"):
        before, _, after = line.partition(" - ")
        if after.split(" ", 1)[0] in MADE_UP:
            major, _, minor = before.split()[2].partition(":")
            found.add(os.makedev(int(major), int(minor)))
    return frozenset(found)


@dataclass(slots=True)
class Packer:
    """``write`` takes the archive's bytes, a piece at a time."""

    write: Callable[[bytes | memoryview], None]
    choice: Choice = Choice()
    tally: Tally = field(default_factory=Tally)
    progress: Callable[[str], None] = lambda _name: None
    _written: int = 0
    _links: dict[tuple[int, int], str] = field(default_factory=dict)

    def run(self, tree: Tree, path: str, *, follow: bool = False, name: str = "") -> Tally:
        """``path``, its entries called ``name``, by default after its last name; ``.`` if it ends in ``/.``.

        A symlink there is an entry itself, unless ``follow`` or it ends in a slash. Raises ArchiveError, and
        what ``write`` raises.
        """
        inward = path.endswith(("/", "/."))
        try:
            fd, names = tree.trail(split(path), last=follow or inward)
            try:
                self._top(fd, names, path, name)
            finally:
                os.close(fd)
        except OSError as error:
            raise at(path, error) from error
        self._put(bytes(BLOCK * 2))
        self._put(bytes(-self._written % RECORD))
        return self.tally

    def _top(self, fd: int, names: list[str], path: str, name: str) -> None:
        info = os.fstat(fd)
        if path.endswith(("/", "/.")) and not stat.S_ISDIR(info.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        contents = path.endswith("/.") or not names
        given = split(path)[-1:]
        name = name or ("." if contents else (given or names)[-1])
        if name == "..":
            name = names[-1]
        if stat.S_ISDIR(info.st_mode):
            directory = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            self._directory(directory, info, name, 0)
        elif stat.S_ISREG(info.st_mode):
            self._file(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC), info, name)
        elif stat.S_ISLNK(info.st_mode):
            member = self._member(info, name, f"/proc/self/fd/{fd}")
            member.linkname = os.readlink("", dir_fd=fd)
            self._header(member)
        else:
            self._special(info, name)

    # -- kinds ------------------------------------------------------------------------------------

    def _directory(self, fd: int, info: os.stat_result, name: str, depth: int) -> None:
        """Uses ``fd`` up."""
        try:
            self._header(self._member(info, name, fd))
            if depth >= MAX_DEPTH:
                raise ArchiveError(
                    Code.FAILED_PRECONDITION, f"{shown(name)} is more than {MAX_DEPTH} directories deep"
                )
            if depth and info.st_dev in self.choice.made_up:
                return
            for entry in sorted(os.listdir(fd)):
                self._entry(fd, entry, f"{name}/{entry}", depth)
        finally:
            os.close(fd)

    def _entry(self, directory: int, entry: str, name: str, depth: int) -> None:
        try:
            info = os.stat(entry, dir_fd=directory, follow_symlinks=False)
            kind = stat.S_IFMT(info.st_mode)
            if kind in (stat.S_IFDIR, stat.S_IFREG):
                # O_NONBLOCK: what is a fifo by now must not be waited for.
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                fd = os.open(entry, flags, dir_fd=directory)
                info = os.fstat(fd)
                if stat.S_IFMT(info.st_mode) != kind:
                    os.close(fd)
                    raise FileNotFoundError(errno.ENOENT, "it has become something else")
                if kind == stat.S_IFDIR:
                    self._directory(fd, info, name, depth + 1)
                else:
                    self._file(fd, info, name)
                return
            member = self._member(info, name, f"/proc/self/fd/{directory}/{entry}")
            if kind == stat.S_IFLNK:
                member.linkname = os.readlink(entry, dir_fd=directory)
        except FileNotFoundError:
            self.tally.skipped += 1  # gone, since it was listed
            return
        except OSError as error:
            if error.errno == errno.ELOOP:  # a symlink by now
                self.tally.skipped += 1
                return
            raise at(name, error) from error
        if kind == stat.S_IFLNK:
            self._header(member)
        else:
            self._special(info, name)

    def _special(self, info: os.stat_result, name: str) -> None:
        kind = stat.S_IFMT(info.st_mode)
        if kind not in _KINDS or not self.choice.special:
            self.tally.skipped += 1  # a socket is nothing without who listens
            return
        member = self._member(info, name, None)
        if kind != stat.S_IFIFO:
            member.devmajor, member.devminor = os.major(info.st_rdev), os.minor(info.st_rdev)
        self._header(member)

    def _file(self, fd: int, info: os.stat_result, name: str) -> None:
        """Uses ``fd`` up."""
        try:
            member = self._member(info, name, fd)
            member.size = info.st_size
            if info.st_nlink > 1:
                first = self._links.setdefault((info.st_dev, info.st_ino), name)
                if first != name:
                    member.type, member.linkname, member.size = tarfile.LNKTYPE, first, 0
                    member.pax_headers = {}
                    self._header(member)
                    return
            pieces = _pieces(fd, info)
            if pieces is None:
                self._header(member)
                self._copy(fd, 0, info.st_size)
                self._pad()
            else:
                self._sparse(fd, member, pieces)
        finally:
            os.close(fd)

    def _sparse(self, fd: int, member: tarfile.TarInfo, pieces: list[tuple[int, int]]) -> None:
        """GNU's sparse format 1.0: the list of pieces comes before their bytes."""
        listing = b"".join(b"%d\n" % number for pair in pieces for number in pair)
        listing = b"%d\n" % len(pieces) + listing
        listing += bytes(-len(listing) % BLOCK)
        member.pax_headers = {
            **member.pax_headers,
            "GNU.sparse.major": "1",
            "GNU.sparse.minor": "0",
            "GNU.sparse.name": member.name,
            "GNU.sparse.realsize": str(member.size),
        }
        member.size = len(listing) + sum(size for _, size in pieces)
        above, _, last = member.name.rpartition("/")
        member.name = f"{above or '.'}/GNUSparseFile.0/{last}"
        self._header(member)
        self._put(listing)
        for offset, size in pieces:
            self._copy(fd, offset, size)
        self._pad()

    # -- writing ----------------------------------------------------------------------------------

    def _member(self, info: os.stat_result, name: str, attributes_of: int | str | None) -> tarfile.TarInfo:
        member = tarfile.TarInfo(name)
        member.type = _KINDS.get(stat.S_IFMT(info.st_mode), tarfile.REGTYPE)
        attributes.describe(member, info, self.choice.uids, self.choice.gids)
        if self.choice.owner is not None:
            member.uid, member.gid = self.choice.owner
        if self.choice.xattrs and attributes_of is not None:
            attributes.describe_xattrs(member, attributes_of)
        return member

    def _header(self, member: tarfile.TarInfo) -> None:
        self.tally.entries += 1
        if self.tally.entries > self.choice.max_entries:
            raise ArchiveError(
                Code.RESOURCE_EXHAUSTED,
                f"there are more than {self.choice.max_entries} entries; allow more",
                field="max_entries",
            )
        self.progress(member.name)
        self._put(member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))

    def _copy(self, fd: int, offset: int, size: int) -> None:
        while size:
            data = os.pread(fd, min(size, CHUNK), offset)
            if not data:
                data = bytes(min(size, CHUNK))  # it has shrunk; the header has promised more
            self._put(data)
            offset, size = offset + len(data), size - len(data)

    def _pad(self) -> None:
        self._put(bytes(-self._written % BLOCK))

    def _put(self, data: bytes) -> None:
        if not data:
            return
        self._written += len(data)
        if self.choice.max_bytes is not None and self._written > self.choice.max_bytes:
            raise ArchiveError(
                Code.RESOURCE_EXHAUSTED,
                f"the archive has more than {self.choice.max_bytes} bytes; allow more",
                field="max_bytes",
            )
        self.write(data)


def _pieces(fd: int, info: os.stat_result) -> list[tuple[int, int]] | None:
    """Where a file with holes has data, lseek(2); None for one without."""
    if info.st_blocks * 512 >= info.st_size:
        return None
    pieces, end = [], 0
    try:
        while end < info.st_size:
            try:
                start = os.lseek(fd, end, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    return None  # this file system has no holes
                break
            end = min(os.lseek(fd, start, os.SEEK_HOLE), info.st_size)
            if start < end:
                pieces.append((start, end - start))
    finally:
        os.lseek(fd, 0, os.SEEK_SET)
    if pieces == [(0, info.st_size)]:
        return None
    # The last one says how large the file is, for readers that go by the list.
    return [*pieces, (info.st_size, 0)]
