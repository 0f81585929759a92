"""Whose the descriptors are that a container gets: root's of its user namespace, where it has one."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable


def give_pipes(fds: Iterable[int | None], owner: tuple[int, int] | None) -> None:
    """Makes pipes the container's own.

    They work without that, but not by name: opening /dev/stdout anew asks for permission, and a runtime
    that hands them on to the process's user can do so only with what its namespace knows. Raises OSError.
    """
    if owner is None:
        return
    for fd in fds:
        if fd is not None and stat.S_ISFIFO(os.fstat(fd).st_mode):
            os.fchown(fd, *owner)
