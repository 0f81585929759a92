"""Records that more than one method carries."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any

from protocol import checks


class StreamMode(StrEnum):
    """What stands behind a process's stdin, stdout, stderr or TTY."""

    NULL = "null"
    """/dev/null."""
    STREAM = "stream"
    """A pipe (or the pty) in the guest, moved by the kernel to whoever is attached."""


class Status(StrEnum):
    """Where a container or process stands. FAILED: it could not be made and could not be cleaned up."""

    CREATING = "creating"
    CREATED = "created"
    RUNNING = "running"
    STOPPED = "stopped"
    DELETING = "deleting"
    FAILED = "failed"


class Reason(StrEnum):
    """Why a process is no more. LOST: it ended while nothing could see its status."""

    EXITED = "exited"
    SIGNALLED = "signalled"
    OOM = "oom"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Winsize:
    """Size of a terminal in characters, as in ioctl_tty(2)."""

    rows: Annotated[int, checks.between(0, 65535)] = 24
    cols: Annotated[int, checks.between(0, 65535)] = 80


@dataclass(frozen=True, slots=True)
class StreamSpec:
    """One stream of a process."""

    mode: StreamMode = StreamMode.NULL


@dataclass(frozen=True, slots=True)
class Stdio:
    """The streams of a process.

    With ``terminal`` the process gets a pty: ``tty`` says what becomes of it and the other three must be
    null. Without, ``tty`` must be null. ``stdin_once`` ends stdin when the client attached to it goes.
    """

    stdin: StreamSpec = StreamSpec()
    stdout: StreamSpec = StreamSpec()
    stderr: StreamSpec = StreamSpec()
    tty: StreamSpec = StreamSpec()
    terminal: bool = False
    winsize: Winsize = Winsize()
    stdin_once: bool = False

    def problem(self) -> str | None:
        """What is contradictory about it, or None."""
        pipes = (self.stdin, self.stdout, self.stderr)
        if self.terminal and any(spec.mode is not StreamMode.NULL for spec in pipes):
            return "with 'terminal' stdin, stdout and stderr must be null: the one stream is 'tty'"
        if not self.terminal and self.tty.mode is not StreamMode.NULL:
            return "'tty' needs 'terminal': true"
        return None


@dataclass(frozen=True, slots=True)
class Rusage:
    """What wait4(2) said the process and its waited-for children used. Times in microseconds."""

    user_us: int = 0
    system_us: int = 0
    max_rss_kib: int = 0
    minor_faults: int = 0
    major_faults: int = 0
    block_in: int = 0
    block_out: int = 0
    voluntary_switches: int = 0
    involuntary_switches: int = 0


@dataclass(frozen=True, slots=True)
class Oom:
    """Which cgroup ran out of memory, and how many of its processes the kernel killed for it."""

    cgroup: str = ""
    kills: int = 0


@dataclass(frozen=True, slots=True)
class ExitRecord:
    """How a process ended; kept until the process is deleted.

    ``exit_code`` is what a shell would show: the status, or 128 + signal. ``streams`` holds, per stream,
    the bytes its process had produced (or taken) when it ended: a reader that has as many has all of it,
    even if some other process still holds the pipe open.
    """

    exit_code: int
    signal: int
    reason: Reason
    pid: int
    started_at_ns: int
    exited_at_ns: int
    core_dumped: bool = False
    rusage: Rusage = Rusage()
    oom: Oom | None = None
    streams: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StreamState:
    """One stream now. ``bytes``: moved to or from clients so far; ``ended``: no more will come."""

    mode: StreamMode
    bytes: int = 0
    attached: bool = False
    ended: bool = False


@dataclass(frozen=True, slots=True)
class ProcessState:
    """One process of a container; ``process`` is ``init`` for its init. Times in ns since the epoch."""

    container: str
    process: str
    status: Status
    pid: int
    args: tuple[str, ...] = ()
    terminal: bool = False
    created_at_ns: int = 0
    started_at_ns: int = 0
    exit: ExitRecord | None = None
    streams: dict[str, StreamState] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ContainerState:
    """One container and its processes, init first."""

    container: str
    status: Status
    pid: int
    bundle: str
    created_at_ns: int
    auto_delete: bool = False
    problem: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    processes: tuple[ProcessState, ...] = ()


@dataclass(frozen=True, slots=True)
class BootStage:
    """A stage the guest's boot reached, in milliseconds since the kernel started."""

    stage: str
    uptime_ms: int


@dataclass(frozen=True, slots=True)
class RuntimeInfo:
    """The OCI runtime in use: its name, the binary's path, and the first line of its ``--version``."""

    name: str
    path: str
    version: str


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened. ``seq`` grows by one per event; ``data`` depends on ``type`` (SPEC.md)."""

    seq: int
    type: str
    time_ns: int
    container: str = ""
    process: str = ""
    data: dict[str, Any] = field(default_factory=dict)
