"""setns(2), for the thread that calls it, with whichever Python there is."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable

CLONE_NEWNS, CLONE_NEWPID, CLONE_NEWNET = 0x00020000, 0x20000000, 0x40000000
KINDS = {
    "mnt": CLONE_NEWNS,
    "cgroup": 0x02000000,
    "uts": 0x04000000,
    "ipc": 0x08000000,
    "user": 0x10000000,
    "pid": CLONE_NEWPID,
    "net": CLONE_NEWNET,
}
"""Names below /proc/PID/ns, and flags of clone(2) (linux/sched.h)."""


def setns(fd: int, kinds: int) -> None:
    """Enters the namespace of ``fd``, or of the process it is a pidfd of (Linux 5.8). Raises OSError."""
    load()(fd, kinds)


@functools.cache
def load() -> Callable[[int, int], object]:
    """What setns needs, also where there is nothing to import any more: os.setns is new in Python 3.12."""
    if sys.version_info >= (3, 12):
        return os.setns
    return _libc_setns()


def _libc_setns() -> Callable[[int, int], object]:
    import ctypes  # on demand: a guest has no need of it

    libc = ctypes.CDLL(None, use_errno=True)

    def call(fd: int, kinds: int) -> None:
        if libc.setns(fd, kinds) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    return call
