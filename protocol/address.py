"""The address forms, parsed: where an agent listens and where a host finds it.

``unix:PATH``            a UNIX socket (no VM: development and tests)
``vsock:CID[:PORT]``     AF_VSOCK to a guest; to listen, ``vsock[:PORT]``
``hvsock:PATH[:PORT]``   hybrid vsock: the VMM's UNIX socket, ``CONNECT <port>\\n`` first (Firecracker,
                         Cloud Hypervisor, vhost-device-vsock)
"""

from __future__ import annotations

from protocol import DEFAULT_PORT
from protocol.dataclass import dataclass


@dataclass(frozen=True, slots=True)
class UnixAddress:
    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


@dataclass(frozen=True, slots=True)
class VsockAddress:
    """``cid`` is None for an address to listen on: whatever CID this machine has."""

    cid: int | None
    port: int = DEFAULT_PORT

    def __str__(self) -> str:
        return f"vsock:{self.port}" if self.cid is None else f"vsock:{self.cid}:{self.port}"


@dataclass(frozen=True, slots=True)
class HybridAddress:
    path: str
    port: int = DEFAULT_PORT

    def __str__(self) -> str:
        return f"hvsock:{self.path}:{self.port}"


def parse_listen(text: str) -> UnixAddress | VsockAddress:
    """``unix:PATH`` or ``vsock[:PORT]``. Raises ValueError saying what is allowed."""
    scheme, _, rest = text.partition(":")
    if scheme == "unix" and rest:
        return UnixAddress(rest)
    if text == "vsock":
        return VsockAddress(None)
    if scheme == "vsock":
        return VsockAddress(None, _number(rest, "port"))
    raise ValueError(f"{text!r}: an address to listen on is unix:PATH or vsock[:PORT]")


def parse_dial(text: str) -> UnixAddress | VsockAddress | HybridAddress:
    """``unix:PATH``, ``vsock:CID[:PORT]`` or ``hvsock:PATH[:PORT]``. Raises ValueError likewise."""
    scheme, _, rest = text.partition(":")
    if scheme == "unix" and rest:
        return UnixAddress(rest)
    if scheme == "vsock" and rest:
        cid, colon, port = rest.partition(":")
        return VsockAddress(_number(cid, "CID"), _number(port, "port") if colon else DEFAULT_PORT)
    if scheme == "hvsock" and rest:
        path, colon, port = rest.rpartition(":")
        if colon and path and port.isdigit():
            return HybridAddress(path, _number(port, "port"))
        return HybridAddress(rest)
    raise ValueError(f"{text!r}: an address is unix:PATH, vsock:CID[:PORT] or hvsock:PATH[:PORT]")


def _number(text: str, what: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 10 or int(text) > 0xFFFF_FFFF:
        raise ValueError(f"{text!r}: a vsock {what} is a number up to 4294967295")
    return int(text)
