"""Makes a socket in another process's network namespace.

A socket stays in the namespace it was made in, so only the making has to happen there: this thread goes
over, makes it, and comes back. setns(2) concerns the calling thread alone, and nothing else runs on it in
between: no thread or process is started from here. An agent that could not come back would from then on do
everything in a container's network: it ends at once, and its successor begins in the right one.
"""

from __future__ import annotations

import functools
import os
import socket
import sys
from collections.abc import Callable

CLONE_NEWNET = 0x40000000  # linux/sched.h

EX_OSERR = 71
"""sysexits.h."""


def make_socket(pidfd: int, family: socket.AddressFamily) -> socket.socket:
    """A non-blocking stream socket in the network namespace of the process of ``pidfd`` (setns(2), Linux
    5.8). Raises OSError, ESRCH when that process has ended."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _setns(pidfd)
        try:
            return socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        finally:
            _come_back(home)
    finally:
        os.close(home)


def _come_back(home: int) -> None:
    try:
        _setns(home)
    except BaseException as error:
        os.write(2, f"cannot return from a container's network namespace: {error}\n".encode())
        os._exit(EX_OSERR)


def _setns(fd: int) -> None:
    _function()(fd, CLONE_NEWNET)


@functools.cache
def _function() -> Callable[[int, int], object]:
    if sys.version_info >= (3, 12):
        return os.setns
    return _libc_setns


def _libc_setns(fd: int, kind: int) -> None:
    """os.setns is new in Python 3.12."""
    import ctypes  # on demand: a guest has no need of it

    if ctypes.CDLL(None, use_errno=True).setns(fd, kind) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
