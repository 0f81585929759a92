"""Dials an agent: a connected, non-blocking socket for each of the three address forms.

Nothing is read beyond what the transport itself needs, so that the socket's next byte is the peer's first.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import re
import socket
from collections.abc import Callable

from gcsagent.host.errors import ConnectFailed, HandshakeFailed, NotReady
from gcsagent.host.text import printable
from protocol.address import HybridAddress, UnixAddress, VsockAddress

Address = UnixAddress | VsockAddress | HybridAddress

HANDSHAKE_SECONDS = 5.0
"""A VMM forwards CONNECT to a guest that may still be booting and can leave it unanswered."""

_LATE_SECONDS = 60.0
"""How long a CONNECT that nobody waits for any more may still be answered."""

_LAST_SECONDS = 0.5
"""The same where the event loop ends first: a whole program may be waiting for it to exit."""

_leaving: set[asyncio.Task[None]] = set()

_MAX_OK_LINE = 32
_OK_LINE = re.compile(rb"OK [0-9]{1,10}\r?\n\Z")

# What a peer that is about to come up looks like. EAGAIN: a UNIX socket's backlog is full (connect(2)).
# ENODEV, ETIMEDOUT, EHOSTUNREACH, ENETUNREACH: no guest has that CID yet (vsock(7)).
_NOT_YET = {
    errno.ENOENT,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EPIPE,
    errno.EAGAIN,
    errno.ETIMEDOUT,
    errno.ENODEV,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
}


async def dial(address: Address, *, handshake_timeout: float = HANDSHAKE_SECONDS) -> socket.socket:
    """One attempt to connect.

    Raises:
        NotReady: nobody is there yet, or closed before the hybrid handshake was through.
        HandshakeFailed: the VMM answered something else than ``OK <port>``.
        ConnectFailed: it cannot work (no permission, path too long, no AF_VSOCK here).
    """
    try:
        if isinstance(address, VsockAddress):
            return await _dial_vsock(address)
        sock = _dial_unix(address.path)
    except (OSError, ValueError) as error:
        raise _cannot(address, error) from error
    if isinstance(address, UnixAddress):
        return sock
    try:
        async with asyncio.timeout(handshake_timeout):
            await _hybrid_handshake(sock, address)
    except (TimeoutError, asyncio.CancelledError) as error:
        _leave(sock)
        if isinstance(error, TimeoutError):
            raise NotReady(f"{address}: CONNECT is not answered in {handshake_timeout:g} s") from error
        raise
    except BaseException as error:
        sock.close()
        if isinstance(error, OSError):
            raise _cannot(address, error) from error
        raise
    return sock


def _leave(sock: socket.socket) -> None:
    """Closes it once CONNECT has been answered: vhost-device-vsock 0.3.0 serves nobody any more when it
    cannot write OK (EPIPE)."""
    task = asyncio.get_running_loop().create_task(_answered(sock))
    _leaving.add(task)

    def over(task: asyncio.Task[None]) -> None:
        _leaving.discard(task)
        with sock, contextlib.suppress(OSError):
            if task.cancelled():  # even before it began: gcsctl is interrupted
                sock.settimeout(_LAST_SECONDS)
                sock.recv(_MAX_OK_LINE)

    task.add_done_callback(over)


async def _answered(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        async with asyncio.timeout(_LATE_SECONDS):
            await receive(sock, _MAX_OK_LINE)


async def receive(sock: socket.socket, size: int) -> bytes:
    """Some bytes, b"" at the end. Raises OSError.

    Cancelled it has taken nothing: ``loop.sock_recv`` loses what came in the moment of the cancellation.
    """
    loop = asyncio.get_running_loop()
    while True:
        try:
            return sock.recv(size)
        except (BlockingIOError, InterruptedError):
            pass
        ready, ring = bell()
        fd = sock.fileno()  # of a socket the selector would have its repr, and so its addresses
        loop.add_reader(fd, ring)
        try:
            await ready
        finally:
            loop.remove_reader(fd)


def bell() -> tuple[asyncio.Future[None], Callable[[], None]]:
    """Something to wait for, and what ends the wait (any number of times)."""
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def ring() -> None:
        if not future.done():
            future.set_result(None)

    return future, ring


def _dial_unix(path: str) -> socket.socket:
    # Not loop.sock_connect(): it takes EAGAIN for "in progress", which AF_UNIX never is.
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    try:
        sock.connect(path)
    except BaseException:
        sock.close()
        raise
    return sock


async def _dial_vsock(address: VsockAddress) -> socket.socket:
    if not hasattr(socket, "AF_VSOCK"):
        raise ConnectFailed(f"{address}: this Python has no AF_VSOCK")
    if address.cid is None:
        raise ConnectFailed(f"{address}: a vsock address to dial needs the guest's CID")
    sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    sock.setblocking(False)
    try:
        # Any in a tuple: typeshed's sock_connect knows AF_INET and AF_UNIX only.
        await asyncio.get_running_loop().sock_connect(sock, (address.cid, address.port))
    except BaseException:
        sock.close()
        raise
    return sock


async def _hybrid_handshake(sock: socket.socket, address: HybridAddress) -> None:
    """``CONNECT <port>``, as in Firecracker's docs/vsock.md. Bytewise: what follows OK is not ours."""
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(sock, b"CONNECT %d\n" % address.port)
    line = bytearray()
    while not line.endswith(b"\n"):
        if len(line) >= _MAX_OK_LINE:
            raise _strange(address, line)
        byte = await loop.sock_recv(sock, 1)
        if not byte:
            raise NotReady(f"{address}: closed before OK; nothing listens on that port in the guest yet")
        line += byte
    if not _OK_LINE.match(line):
        raise _strange(address, line)


def _strange(address: HybridAddress, line: bytearray) -> HandshakeFailed:
    shown = printable(line.decode("utf-8", "replace").strip())
    return HandshakeFailed(
        f"{address}: the socket answered {shown!r} to CONNECT; is it a VMM's vsock socket?"
    )


def _cannot(address: Address, error: Exception) -> ConnectFailed:
    number = error.errno if isinstance(error, OSError) else None
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    kind = NotReady if number in _NOT_YET else ConnectFailed
    return kind(f"{address}: {reason}")
