"""``process.*``: init and execs alike."""

from __future__ import annotations

from typing import Any

from protocol import checks
from protocol.dataclass import dataclass
from protocol.families.container import Created, Deleted
from protocol.method import QUICK, RUNTIME, Empty, Method
from protocol.types import ExitRecord, ProcessState, Stdio, Winsize


@dataclass(frozen=True, slots=True)
class ProcessRef:
    container: checks.Id
    process: checks.Id = checks.INIT


@dataclass(frozen=True, slots=True)
class Exec:
    """``spec`` is an OCI process object; what it leaves out is inherited from the container's own.

    Its ``env`` is added to the container's, a later value of a name winning.
    """

    container: checks.Id
    process: checks.Id
    """The new process's id; ``init`` is taken."""
    spec: dict[str, Any]
    """An OCI process object; ``args`` is required, what is left out comes from the container's own."""
    stdio: Stdio = Stdio()
    """What stands behind its streams."""
    auto_delete: bool = False
    """Delete its record once it has ended and its output is taken."""
    add_capabilities: tuple[str, ...] = ()
    """Capabilities by full name, as CAP_NET_ADMIN, or ALL, on top of those it has otherwise."""


@dataclass(frozen=True, slots=True)
class KillProcess:
    container: checks.Id
    process: checks.Id = checks.INIT
    signal: checks.Signal = "SIGTERM"
    """What to send."""


@dataclass(frozen=True, slots=True)
class Resize:
    container: checks.Id
    process: checks.Id = checks.INIT
    winsize: Winsize = Winsize()
    """The new size; the foreground process group gets SIGWINCH."""


@dataclass(frozen=True, slots=True)
class CloseStdin:
    """Ends stdin once ``offset`` bytes of it have reached the process's pipe; without it, at once."""

    container: checks.Id
    process: checks.Id = checks.INIT
    offset: checks.Offset | None = None
    """End it once this many bytes have reached the pipe; absent, at once."""


METHODS = (
    Method("process.exec", Exec, Created, RUNTIME, True, "runc exec has succeeded"),
    Method("process.state", ProcessRef, ProcessState, QUICK),
    Method("process.kill", KillProcess, Empty, QUICK, True, "the signal has been sent"),
    Method("process.resize", Resize, Empty, QUICK, True, "the ioctl has been made"),
    Method("process.close_stdin", CloseStdin, Empty, QUICK, True, "the end has been noted"),
    Method("process.wait", ProcessRef, ExitRecord, None),
    Method("process.delete", ProcessRef, Deleted, RUNTIME, True, "the record has been removed"),
)
