"""Makes a socket in another process's network namespace.

A socket stays in the namespace it was made in, so only the making has to happen there: this thread goes
over, makes it, and comes back. setns(2) concerns the calling thread alone, and nothing else runs on it in
between: no thread or process is started from here. An agent that could not come back would from then on do
everything in a container's network: it ends at once, and its successor begins in the right one.
"""

from __future__ import annotations

import os
import socket

from gcsagent.common.namespaces import CLONE_NEWNET, setns

EX_OSERR = 71
"""sysexits.h."""


def make_socket(pidfd: int, family: socket.AddressFamily) -> socket.socket:
    """A non-blocking stream socket in the network namespace of the process of ``pidfd`` (setns(2), Linux
    5.8). Raises OSError, ESRCH when that process has ended."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        setns(pidfd, CLONE_NEWNET)
        try:
            return socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        finally:
            _come_back(home)
    finally:
        os.close(home)


def _come_back(home: int) -> None:
    try:
        setns(home, CLONE_NEWNET)
    except BaseException as error:
        os.write(2, f"cannot return from a container's network namespace: {error}\n".encode())
        os._exit(EX_OSERR)
