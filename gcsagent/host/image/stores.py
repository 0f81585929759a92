"""Where an image's files are: below a directory, or in a tar that is read in place."""

from __future__ import annotations

import errno
import os
import stat
import tarfile
from pathlib import Path
from typing import Protocol

from gcsagent.host.image.errors import Damaged, NotFound, TooLarge, Unsupported
from gcsagent.host.image.limits import MAX_DOCUMENT
from gcsagent.tarball.errors import ArchiveError
from gcsagent.tarball.members import members
from gcsagent.tarball.source import CHUNK, Source
from gcsagent.tarball.tree import split

MAX_MEMBERS = 100_000
_MAX_LINKS = 8
_PACKED = {b"\x1f\x8b": "gunzip", b"\x28\xb5\x2f\xfd": "unzstd", b"BZ": "bunzip2", b"\xfd7zX": "unxz"}


class Blob:
    """A stretch of an open file, read from its beginning on."""

    def __init__(self, fd: int, offset: int, size: int, *, own: bool) -> None:
        self._fd, self._at, self._end, self._own = fd, offset, offset + size, own
        self.size = size

    def read(self, count: int = CHUNK) -> bytes:
        """At most ``count`` bytes, none at the end. Raises Damaged when the file has become shorter."""
        count = min(count, self._end - self._at)
        if count <= 0:
            return b""
        data = os.pread(self._fd, count, self._at)
        if not data:
            raise Damaged("the image is cut off: a file ends before it should")
        self._at += len(data)
        return data

    def close(self) -> None:
        if self._own:
            os.close(self._fd)
            self._own = False


class Store(Protocol):
    """Files of an image, by their paths in it."""

    def open(self, name: str) -> Blob:
        """Raises NotFound, Damaged."""
        ...

    def has(self, name: str) -> bool: ...

    def close(self) -> None: ...


def document(store: Store, name: str) -> bytes:
    """A small file, whole. Raises NotFound, Damaged, TooLarge."""
    blob = store.open(name)
    try:
        if blob.size > MAX_DOCUMENT:
            raise TooLarge(f"the image's {name} has {blob.size} bytes; {MAX_DOCUMENT} are read at the most")
        return b"".join(iter(blob.read, b""))
    finally:
        blob.close()


class DirectoryStore:
    """Below a directory; symlinks in it are not followed."""

    def __init__(self, root: Path) -> None:
        self._root = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def open(self, name: str) -> Blob:
        fd = self._open(name)
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            os.close(fd)
            raise Damaged(f"the image's {name} is no file")
        return Blob(fd, 0, info.st_size, own=True)

    def has(self, name: str) -> bool:
        try:
            self.open(name).close()
        except (NotFound, Damaged):
            return False
        return True

    def close(self) -> None:
        os.close(self._root)

    def _open(self, name: str) -> int:
        parts = split(name)
        at = os.dup(self._root)
        try:
            for part in parts[:-1]:
                below = os.open(part, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
                os.close(at)
                at = below
            # O_NONBLOCK: what is a fifo must not be waited for.
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            return os.open(parts[-1], flags, dir_fd=at)
        except OSError as error:
            if error.errno == errno.ENOENT:
                raise NotFound(f"the image has no {name}; it is incomplete") from error
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                raise Damaged(f"the image's {name} is reached through a symlink, or is none") from error
            raise
        finally:
            os.close(at)


class TarStore:
    """Members of a tar; what are links in it lead to other members only."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            info = os.fstat(self._fd)
            if not stat.S_ISREG(info.st_mode):
                raise Unsupported(f"{path} is no file; an image is a directory with an OCI layout, or a tar")
            self._refuse_packed(path)
            self._files, self._links = self._list(info.st_size)
        except ArchiveError as error:
            os.close(self._fd)
            raise Damaged(f"{path} is no image: {error.message}") from error
        except BaseException:
            os.close(self._fd)
            raise

    def open(self, name: str) -> Blob:
        found = self._files.get(self._resolved(name))
        if found is None:
            raise NotFound(f"the image has no {name}; it is incomplete")
        return Blob(self._fd, *found, own=False)

    def has(self, name: str) -> bool:
        return self._resolved(name) in self._files

    def close(self) -> None:
        os.close(self._fd)

    def _resolved(self, name: str) -> str:
        name = _plain(name)
        for _ in range(_MAX_LINKS):
            if name not in self._links:
                break
            name = self._links[name]
        return name

    def _refuse_packed(self, path: Path) -> None:
        head = os.pread(self._fd, 4, 0)
        for magic, tool in _PACKED.items():
            if head.startswith(magic):
                raise Unsupported(f"{path} is compressed; unpack it with {tool} first")

    def _list(self, size: int) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
        at = 0

        def more() -> bytes:
            nonlocal at
            data = os.pread(self._fd, CHUNK, at)
            at += len(data)
            return data

        def leap(count: int) -> None:
            nonlocal at
            at += count
            if at > size:
                raise Damaged("the image is cut off: a file in it ends behind its end")

        files: dict[str, tuple[int, int]] = {}
        links: dict[str, str] = {}
        source = Source(more, leap=leap)
        for number, (member, stored) in enumerate(members(source)):
            if number >= MAX_MEMBERS:
                raise TooLarge(f"the image's tar has more than {MAX_MEMBERS} members")
            name = _plain(member.name)
            if name in files or name in links:
                raise Damaged(f"the image's tar has {name!r:.200} twice")
            if member.isreg() and getattr(member, "sparse", None) is None:
                if not 0 <= member.size <= stored:
                    raise Damaged(f"{name!r:.200} in the image's tar claims a size it does not have")
                files[name] = (member.offset_data, member.size)
            elif member.type in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                above = "" if member.islnk() else name.rpartition("/")[0]
                links[name] = _plain(f"{above}/{member.linkname}")
        return files, links


def _plain(name: str) -> str:
    """Without ``.`` and ``..``, which end at the archive's own root."""
    parts: list[str] = []
    for part in split(name):
        if part == "..":
            del parts[-1:]
        else:
            parts.append(part)
    return "/".join(parts)
