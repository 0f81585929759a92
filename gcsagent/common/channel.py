"""Messages and file descriptors between supervisor and agent.

One SOCK_SEQPACKET socket pair per agent process; a packet is one MessagePack array plus its descriptors:

    agent -> supervisor   [id, operation, arguments]
                          [nil, "alive", {}]              for the watchdog; unanswered
    supervisor -> agent   [id, error or nil, result]       the answer; to a negative id only a refusal
                          [nil, topic, data]               a notification

SEQPACKET keeps packet boundaries, so neither side parses a stream, and a packet arrives whole with its
descriptors or not at all: an agent killed in the middle of a send leaves nothing half-done behind.
"""

from __future__ import annotations

import array
import os
import socket

import msgpack

TYPE_CHECKING = False  # typing itself is half a megabyte
if TYPE_CHECKING:
    from typing import Any

MAX_PACKET = 128 * 1024
"""Bytes of one packet. The largest is a spawn with its environment; the kernel's default send buffer is
208 KiB and a packet must fit it whole."""

MAX_FDS = 64
"""Descriptors in one packet; the kernel's own bound is SCM_MAX_FD, 253 (unix(7))."""


_CUT_SHORT, _CLOSE_ON_EXEC = int(socket.MSG_TRUNC | socket.MSG_CTRUNC), int(socket.MSG_CMSG_CLOEXEC)
"""Numbers: the socket module's flags are objects, and each sum of two is a new one."""


class ChannelError(Exception):
    """A packet that breaks the rules above."""


def pair() -> tuple[socket.socket, socket.socket]:
    """A connected channel: (supervisor's end, agent's end), both close-on-exec."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MAX_PACKET)
    return ours, theirs


def pack(message: list[Any]) -> bytes:
    """Raises ChannelError when the message is too large for one packet."""
    packet: bytes = msgpack.packb(message, use_bin_type=True)
    if len(packet) > MAX_PACKET:
        raise ChannelError(f"a packet of {len(packet)} bytes; at most {MAX_PACKET} fit")
    return packet


def send(sock: socket.socket, packet: bytes, fds: tuple[int, ...] = ()) -> None:
    """Sends one packet whole. Raises BlockingIOError when a non-blocking socket is full, OSError else."""
    if fds:
        socket.send_fds(sock, [packet], fds)
    else:
        sock.send(packet)


def receive(sock: socket.socket) -> tuple[list[Any], list[int]] | None:
    """The next message and its descriptors (close-on-exec, now the caller's); None at end of file.

    Raises BlockingIOError when there is none yet, ChannelError (with the descriptors closed) when the
    packet is malformed.
    """
    data, fds, flags = receive_fds(sock, MAX_PACKET + 1, MAX_FDS)
    if not data:
        close_all(fds)
        return None
    try:
        if flags & _CUT_SHORT:
            raise ChannelError("a packet was longer, or carried more descriptors, than is allowed")
        message = msgpack.unpackb(data, raw=False, strict_map_key=True)
        if not isinstance(message, list) or len(message) != 3:
            raise ChannelError("a packet is an array of three")
    except ChannelError:
        close_all(fds)
        raise
    except (ValueError, TypeError) as error:
        close_all(fds)
        raise ChannelError(f"not a packet: {error}") from error
    return message, fds


def receive_fds(sock: socket.socket, size: int, most: int) -> tuple[bytes, list[int], int]:
    """Data, at most ``most`` descriptors (close-on-exec) and the message's flags. Raises OSError.

    Not socket.recv_fds: it takes flags and ignores them, so what it receives every child would inherit.
    """
    fds = array.array("i")
    room = socket.CMSG_LEN(most * fds.itemsize)
    data, control, flags, _ = sock.recvmsg(size, room, _CLOSE_ON_EXEC)
    for level, kind, content in control:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    return data, list(fds), flags


def close_all(fds: list[int] | tuple[int, ...]) -> None:
    for fd in fds:
        os.close(fd)
