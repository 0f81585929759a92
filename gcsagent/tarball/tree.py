"""Names below a root directory, looked up so that none leads outside.

Step by step from descriptor to descriptor, never through a symlink the kernel would follow for us, and up
again only by descriptors that were passed on the way down: a tree that changes meanwhile, because a process
in a container swaps directories for symlinks, leads nowhere else either. It is what openat2(2) does with
RESOLVE_IN_ROOT, for which Python has no call.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Sequence

from gcsagent.tarball.errors import ArchiveError, at, damaged, shown
from protocol.errors import Code

MAX_LINKS = 40
"""Symlinks followed in one lookup; the kernel's own bound (path_resolution(7))."""

_STEP = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC

NEW_DIRECTORY = 0o755


def split(path: str) -> list[str]:
    """The names in ``path``; ``..`` stays."""
    return [part for part in path.split("/") if part not in ("", ".")]


class Tree:
    """``follow`` False: a symlink on the way is an error, wherever it leads.

    ``barred`` are symlinks, by device and inode, that nothing may go through: those an archive made itself.
    """

    def __init__(self, root: int, *, follow: bool = True, owner: tuple[int, int] | None = None) -> None:
        """``root`` stays the caller's; ``owner`` is whose directories are that are made on the way."""
        self.root, self._follow, self._owner = root, follow, owner
        self.barred: set[tuple[int, int]] = set()

    def lookup(self, parts: Sequence[str], *, make: bool = False, last: bool = True) -> int:
        """An O_PATH descriptor of what ``parts`` name from the root on.

        ``make``: directories that are missing are made. ``last`` False: if the last one is a symlink, it is
        that which is opened. Raises OSError, ArchiveError.
        """
        return self.trail(parts, make=make, last=last)[0]

    def trail(self, parts: Sequence[str], *, make: bool = False, last: bool = True) -> tuple[int, list[str]]:
        """Likewise, with the names of the way there that are no symlinks."""
        ahead = [(part, True) for part in reversed(parts) if part not in ("", ".")]
        walked, names = [os.dup(self.root)], list[str]()
        links = 0
        try:
            while ahead:
                part, given = ahead.pop()
                if part == "..":
                    if names:
                        os.close(walked.pop())
                        names.pop()
                    continue
                walked.append(self._step(walked[-1], part, make and given))
                names.append(part)
                info = os.fstat(walked[-1])
                if not stat.S_ISLNK(info.st_mode) or (not ahead and not last):
                    continue
                links += 1
                self._check_link(info, names, links)
                target = os.readlink("", dir_fd=walked[-1])
                back = len(walked) - 1 if target.startswith("/") else 1
                for _ in range(back):
                    os.close(walked.pop())
                    names.pop()
                ahead += [(piece, False) for piece in reversed(split(target))]
            return walked.pop(), names
        finally:
            for fd in walked:
                os.close(fd)

    def _check_link(self, info: os.stat_result, names: list[str], links: int) -> None:
        path = "/".join(names)
        if (info.st_dev, info.st_ino) in self.barred:
            raise damaged(f"a name leads through {shown(path)}, a symlink that is in it, too")
        if not self._follow:
            raise ArchiveError(
                Code.FAILED_PRECONDITION, f"{shown(path)} is a symlink, which is not followed here"
            )
        if links > MAX_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)

    def directory(self, parts: Sequence[str], *, make: bool = False) -> int:
        """Likewise, of a directory. Raises NotADirectoryError for anything else."""
        fd = self.lookup(parts, make=make)
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            os.close(fd)
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), "/".join(parts))
        return fd

    def look(self, path: str) -> os.stat_result | None:
        """What ``path`` names, symlinks followed; None if there is nothing. Raises ArchiveError."""
        try:
            fd = self.lookup(split(path))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise at(path, error) from error
        try:
            return os.fstat(fd)
        finally:
            os.close(fd)

    def _step(self, directory: int, name: str, make: bool) -> int:
        try:
            return os.open(name, _STEP, dir_fd=directory)
        except FileNotFoundError:
            if not make:
                raise
        with contextlib.suppress(FileExistsError):  # somebody was faster
            os.mkdir(name, NEW_DIRECTORY, dir_fd=directory)
            if self._owner is not None:
                os.chown(name, *self._owner, dir_fd=directory, follow_symlinks=False)
        return os.open(name, _STEP, dir_fd=directory)
