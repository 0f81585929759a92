"""Looks a program up inside a root directory, as execvp(3) would there: no symlink leads outside."""

from __future__ import annotations

import os
import stat

MAX_LINKS = 40
"""Symlinks followed before giving up; the kernel's own bound (path_resolution(7))."""

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
