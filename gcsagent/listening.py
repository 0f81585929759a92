"""Sockets to listen on: the agent's, the debug shell's, and on the host those that are forwarded."""

from __future__ import annotations

import os
import socket
import stat

BACKLOG = 128


def listen_unix(path: str) -> socket.socket:
    """Raises OSError. A socket file that a crash has left gives way; one that is listened on does not."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if _is_stale(path):
            os.unlink(path)
        mask = os.umask(0o177)  # only its owner, and whoever root lets in, may talk to us
        try:
            listener.bind(path)
        finally:
            os.umask(mask)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def _is_stale(path: str) -> bool:
    """A socket file nobody listens on, as a crash leaves it."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return False
    except FileNotFoundError:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False


def listen_vsock(port: int) -> socket.socket:
    """Whatever CID this machine has. Raises OSError."""
    listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    try:
        listener.bind((socket.VMADDR_CID_ANY, port))
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener
