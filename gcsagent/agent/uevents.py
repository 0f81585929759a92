"""Devices come and go: told by the kernel over a netlink socket (NETLINK_KOBJECT_UEVENT, netlink(7)).

The kernel tells of a device after it has made its entry in sysfs and its node. Whoever waits for one opens
this first and looks then, so that nothing can come between the two.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Iterator

_NETLINK_KOBJECT_UEVENT = 15  # linux/netlink.h
_KERNEL_GROUP = 1
_RECEIVE = 64 * 1024


@contextlib.contextmanager
def changes(*subsystems: str) -> Iterator[asyncio.Event]:
    """An event that is set whenever a device of these subsystems came, went or changed. Raises OSError."""
    changed, loop = asyncio.Event(), asyncio.get_running_loop()
    wanted = {f"SUBSYSTEM={name}".encode() for name in subsystems}
    with _socket() as sock:

        def read() -> None:
            told = _told(sock)
            if told is None or told & wanted:
                changed.set()

        loop.add_reader(sock, read)
        try:
            yield changed
        finally:
            loop.remove_reader(sock)


def _told(sock: socket.socket) -> set[bytes] | None:
    """The ``KEY=VALUE`` pairs of the next message; None when some were lost, which may have said anything."""
    try:
        return set(sock.recv(_RECEIVE).split(b"\0"))
    except BlockingIOError:
        return set()
    except OSError as error:
        if error.errno != errno.ENOBUFS:
            raise
        return None


def _socket() -> socket.socket:
    sock = socket.socket(
        socket.AF_NETLINK,
        socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC,
        _NETLINK_KOBJECT_UEVENT,
    )
    try:
        sock.bind((0, _KERNEL_GROUP))
    except BaseException:
        sock.close()
        raise
    return sock
