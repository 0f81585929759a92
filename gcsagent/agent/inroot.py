"""Looks things up inside a root directory, as a process there would: no symlink leads outside."""

from __future__ import annotations

import errno
import os
import stat

from gcsagent.tarball.tree import MAX_LINKS, Tree, split

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def find_program(root: str, program: str, path: str, cwd: str) -> str:
    """``""`` when ``program`` can be executed inside ``root``, else ``not_found`` or ``not_executable``."""
    if "/" in program:
        candidates = [program if program.startswith("/") else os.path.join(cwd, program)]
    else:
        candidates = [os.path.join(entry or cwd, program) for entry in path.split(":")]
    worst = "not_found"
    for candidate in candidates:
        found = resolve(root, candidate)
        if found is None:
            continue
        mode = os.stat(found).st_mode
        if stat.S_ISREG(mode) and mode & 0o111:
            return ""
        worst = "not_executable"
    return worst


def resolve(root: str, path: str) -> str | None:
    """The path outside of what ``path`` names inside ``root``, symlinks followed; None if there is nothing.

    Only for looking: between this and any use of the result the tree may change.
    """
    parts = [part for part in reversed(path.split("/")) if part not in ("", ".")]
    inside: list[str] = []
    links = 0
    while parts:
        part = parts.pop()
        if part == "..":
            inside[-1:] = []
            continue
        here = os.path.join(root, *inside, part)
        try:
            info = os.lstat(here)
        except OSError:
            return None
        if not stat.S_ISLNK(info.st_mode):
            inside.append(part)
            continue
        links += 1
        if links > MAX_LINKS:
            return None
        target = os.readlink(here)
        if target.startswith("/"):
            inside.clear()
        parts.extend(piece for piece in reversed(target.split("/")) if piece not in ("", "."))
    return os.path.join(root, *inside)


def open_inside(root: int, path: str) -> int:
    """An O_PATH descriptor of what ``path`` names inside the directory ``root``, itself no symlink.

    Step by step from descriptor to descriptor, so that a tree that changes meanwhile cannot lead outside
    either. Raises OSError.
    """
    return Tree(root).lookup(split(path))


def read_inside(root: int, path: str, limit: int) -> bytes:
    """The regular file that ``path`` names inside ``root``. Raises OSError; EFBIG beyond ``limit`` bytes.

    No more is read than it says it has: the files of /proc call themselves regular and have none, and behind
    a symlink to /proc/kmsg the reader waits for the kernel to say something.
    """
    fd = open_inside(root, path)
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", path)
        if info.st_size > limit:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), path)
        if not info.st_size:
            return b""
        with open(f"/proc/self/fd/{fd}", "rb") as file:
            return file.read(info.st_size)
    finally:
        os.close(fd)
