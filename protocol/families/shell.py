"""``shell.*``: the debug shell, which has a port and a process of its own and is not the agent's."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated

from protocol import checks
from protocol.dataclass import dataclass, field
from protocol.limits import MAX_DEADLINE_MS
from protocol.method import QUICK, Empty, Method
from protocol.types import Winsize

SHELL = "shell"
"""In ``features`` of the hello of a debug shell's port, and of no other's."""

MAX_SHELLS = 32
"""Shells at the same time."""

MAX_WORDS = 1024
"""Of a command, and of an environment."""

_TERM = re.compile(r"[A-Za-z0-9][A-Za-z0-9+._-]{0,63}\Z")


def command(value: tuple[str, ...]) -> str | None:
    if len(value) > MAX_WORDS:
        return f"must have at most {MAX_WORDS} entries, not {len(value)}"
    if value and not value[0]:
        return "must begin with a program's name or path"
    return "must not contain a NUL byte" if any("\0" in word for word in value) else None


def environment(value: dict[str, str]) -> str | None:
    if len(value) > MAX_WORDS:
        return f"must have at most {MAX_WORDS} entries, not {len(value)}"
    if any(not name or "=" in name for name in value):
        return "must have names without '=' as keys"
    return "must not contain a NUL byte" if any("\0" in text for text in (*value, *value.values())) else None


def terminal_type(value: str) -> str | None:
    """As terminfo names its entries (term(7))."""
    return None if _TERM.match(value) else "must be a terminal's type, like xterm or linux"


@dataclass(frozen=True, slots=True)
class OpenShell:
    container: checks.Id | None = None
    """Whose namespaces and root directory; absent, the guest's own."""
    argv: Annotated[tuple[str, ...], command] = ()
    """What to execute; empty: bash if it is there, else sh."""
    env: Annotated[dict[str, str], environment] = field(default_factory=dict)
    """Added to the environment it gets otherwise: of a container's spec, or a few usual values."""
    terminal: bool = True
    """On a terminal; else on pipes: standard error comes with the output, and ``shell.close_input`` ends the
    input."""
    term: Annotated[str, terminal_type] = "linux"
    """Type of the client's terminal: TERM."""
    winsize: Winsize = Winsize()
    """Size of the terminal at the start."""
    timeout_ms: Annotated[int, checks.Between(1, MAX_DEADLINE_MS)] | None = None
    """How long it may run before it is ended; absent: as long as the client stays."""


@dataclass(frozen=True, slots=True)
class ShellOpened:
    shell: checks.Id
    """Names this shell in the requests below."""
    pid: int
    """Of the process, as the guest counts."""


@dataclass(frozen=True, slots=True)
class ShellRef:
    shell: checks.Id
    """As ``shell.open`` has named it."""


@dataclass(frozen=True, slots=True)
class ResizeShell:
    shell: checks.Id
    """As ``shell.open`` has named it."""
    winsize: Winsize = Winsize()
    """The new size; the foreground process group gets SIGWINCH."""


@dataclass(frozen=True, slots=True)
class CloseInput:
    """What the client sends to a shell without a terminal ends at ``offset``."""

    shell: checks.Id
    """As ``shell.open`` has named it."""
    offset: checks.Offset
    """Bytes the client has sent in all."""


class ShellEnd(StrEnum):
    """Why a shell is no more."""

    EXITED = "exited"
    """It returned, or called exit."""
    SIGNALLED = "signalled"
    """A signal ended it that was none of those below."""
    HANGUP = "hangup"
    """The client closed its connection."""
    TIMEOUT = "timeout"
    """Its time limit passed."""
    KILLED = "killed"
    """``shell.kill`` ended it."""
    CONTAINER = "container"
    """The init process of its container ended."""
    SHUTDOWN = "shutdown"
    """The guest, or the supervisor, is being ended."""


@dataclass(frozen=True, slots=True)
class ShellExit:
    exit_code: int
    """The status, or 128 + signal."""
    signal: int
    """What ended it; 0 when it exited by itself."""
    reason: ShellEnd
    """Why it is no more."""
    bytes: int
    """Of its output; the client has all of it once it has read as many."""
    duration_ms: int
    """How long it has run."""


@dataclass(frozen=True, slots=True)
class ShellState:
    shell: checks.Id
    """As ``shell.open`` has named it."""
    pid: int
    """Of the process, as the guest counts."""
    argv: tuple[str, ...]
    """What was asked for; empty: bash or sh."""
    peer: str
    """Who has opened it: ``vsock:CID:PORT`` or ``unix:pid=PID,uid=UID``."""
    client: str
    """What that one called itself in hello."""
    running_ms: int
    """How long it has run."""
    container: str = ""
    """Whose namespaces; empty: the guest's own."""


@dataclass(frozen=True, slots=True)
class ShellList:
    shells: tuple[ShellState, ...]
    """In the order they were opened."""


METHODS = (
    Method("shell.open", OpenShell, ShellOpened, QUICK, streams=True),
    Method("shell.resize", ResizeShell, Empty, QUICK),
    Method("shell.close_input", CloseInput, Empty, QUICK),
    Method("shell.wait", ShellRef, ShellExit, None),
    Method("shell.kill", ShellRef, Empty, QUICK),
    Method("shell.list", Empty, ShellList, QUICK),
)
