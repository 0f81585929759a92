"""``forward.*``: connections to what listens in the guest or in a container."""

from __future__ import annotations

from typing import Annotated

from protocol import checks
from protocol.dataclass import dataclass
from protocol.method import QUICK, Empty, Method

MAX_PORT = 65_535


@dataclass(frozen=True, slots=True)
class OpenForward:
    """Exactly one of ``port`` and ``path``."""

    container: checks.Id | None = None
    """Whose network, or whose files; absent, the guest itself."""
    port: Annotated[int, checks.Between(1, MAX_PORT)] | None = None
    """A TCP port."""
    address: checks.IpAddress | None = None
    """Where that port is; absent, 127.0.0.1 and, when nothing listens there, ::1."""
    path: checks.Path | None = None
    """A UNIX stream socket, as a process there names it: a symbolic link leads nowhere outside."""


@dataclass(frozen=True, slots=True)
class ForwardOpened:
    forward: checks.Id
    """Names this forward in the requests below, until its connection is closed."""
    to: str
    """What has been connected to: ``127.0.0.1:80``, ``[::1]:80`` or the path."""


@dataclass(frozen=True, slots=True)
class CloseWrite:
    """What the client sends ends at ``offset``."""

    forward: checks.Id
    """As ``forward.open`` has named it."""
    offset: checks.Offset
    """Bytes the client has sent in all."""


@dataclass(frozen=True, slots=True)
class ForwardRef:
    forward: checks.Id
    """As ``forward.open`` has named it."""


@dataclass(frozen=True, slots=True)
class ForwardEnd:
    """What the target sends has ended."""

    bytes: int
    """Sent by the target in all; each is on the stream by now."""
    errno: int = 0
    """0 for an end in order; else what broke the target's connection, such as ECONNRESET."""


METHODS = (
    Method("forward.open", OpenForward, ForwardOpened, QUICK, streams=True),
    Method(
        "forward.close_write",
        CloseWrite,
        Empty,
        None,
        True,
        "the end has been noted, and comes as soon as the bytes before it are through",
    ),
    Method("forward.wait", ForwardRef, ForwardEnd, None),
)
