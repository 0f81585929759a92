"""Connects to what a forward leads to, without waiting for it anywhere but in the event loop."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import stat

from gcsagent.agent.container import Container
from gcsagent.agent.forwarding import netns
from gcsagent.agent.inroot import open_inside
from protocol.errors import Code, RpcError
from protocol.families.forward import OpenForward

LOOPBACK = ("127.0.0.1", "::1")
_NOBODY_THERE = (errno.ECONNREFUSED, errno.EADDRNOTAVAIL, errno.ENETUNREACH, errno.EAFNOSUPPORT)
"""Why it may be listening on the other loopback address."""

_FULL = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)
_CODES = {
    errno.ENOENT: (Code.NOT_FOUND, "name a socket that is there"),
    errno.ENOTDIR: (Code.NOT_FOUND, "name a socket that is there"),
    errno.ELOOP: (Code.NOT_FOUND, ""),
    errno.ECONNREFUSED: (Code.FAILED_PRECONDITION, "start the server first"),
    errno.ENOTSOCK: (Code.FAILED_PRECONDITION, "name a stream socket"),
    errno.EPROTOTYPE: (Code.FAILED_PRECONDITION, "name a stream socket"),
    errno.ESRCH: (Code.FAILED_PRECONDITION, "the container has ended"),
    errno.EACCES: (Code.PERMISSION_DENIED, ""),
    errno.EPERM: (Code.PERMISSION_DENIED, ""),
    errno.EAGAIN: (Code.UNAVAILABLE, "the server's queue of connections is full: try again"),
}


def check(params: OpenForward) -> None:
    """Raises INVALID_ARGUMENT for what contradicts itself."""
    if (params.port is None) == (params.path is None):
        raise RpcError(Code.INVALID_ARGUMENT, "give a port or a path, one of the two", field="port")
    if params.path is not None and params.address is not None:
        raise RpcError(Code.INVALID_ARGUMENT, "an address goes with a port", field="address")
    if params.address is not None and "%" in params.address:
        raise RpcError(Code.INVALID_ARGUMENT, "a zone says nothing in another network", field="address")


async def connect(params: OpenForward, container: Container | None) -> tuple[socket.socket, str]:
    """The connected socket and what it is connected to; ``container`` None is the guest itself.

    Raises RpcError, with ``errno`` in its details. Cancelled, it leaves nothing behind.
    """
    if params.path is not None:
        try:
            return connect_unix(params.path, container), params.path
        except OSError as error:
            raise explain(error, params.path, container) from error
    assert params.port is not None
    addresses = LOOPBACK if params.address is None else (params.address,)
    first: OSError | None = None
    for address in addresses:
        try:
            return await _connect_tcp(address, params.port, container), shown(address, params.port)
        except OSError as error:
            first = first or error
            if error.errno not in _NOBODY_THERE:
                break
    assert first is not None
    raise explain(first, shown(addresses[0], params.port), container) from first


def shown(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def explain(error: OSError, where: str, container: Container | None) -> RpcError:
    """The one error of a connection that did not come about."""
    number = error.errno or 0
    inside = f"container {container.ident}" if container is not None else "the guest"
    reason = os.strerror(number) if number else str(error)
    code, hint = _CODES.get(number, (Code.UNAVAILABLE, ""))
    if number in _FULL:
        code = Code.RESOURCE_EXHAUSTED
    text = f"{reason}; {hint}" if hint else reason
    return RpcError(code, f"cannot connect to {where} in {inside}: {text}", errno=number)


async def _connect_tcp(address: str, port: int, container: Container | None) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    if container is None:
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    else:
        sock = netns.make_socket(_pidfd(container), family)
    try:
        # What has been written together need not wait for more: the client's own kernel has decided that.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.get_running_loop().sock_connect(sock, (address, port))
    except BaseException:
        sock.close()
        raise
    return sock


def connect_unix(path: str, container: Container | None) -> socket.socket:
    """To the stream socket that ``path`` names in the guest, or in the container's root. Raises OSError."""
    target = _find_socket(path, container)
    try:
        if not stat.S_ISSOCK(os.fstat(target).st_mode):
            raise OSError(errno.ENOTSOCK, os.strerror(errno.ENOTSOCK))
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            sock.connect(f"/proc/self/fd/{target}")  # never in progress: connected, or EAGAIN
        except BaseException:
            sock.close()
            raise
        return sock
    finally:
        os.close(target)


def _find_socket(path: str, container: Container | None) -> int:
    where = "/" if container is None else f"/proc/{container.init.pid}/root"
    root = os.open(where, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if container is not None:
            _pidfd(container)  # it has not ended: the pid was still its own
        return open_inside(root, path)
    finally:
        os.close(root)


def _pidfd(container: Container) -> int:
    """Of its init, which has not ended. Raises OSError, ESRCH."""
    pidfd = container.init.pidfd
    if pidfd < 0:
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
    signal.pidfd_send_signal(pidfd, 0)
    return pidfd
