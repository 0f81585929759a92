"""Records that more than one method carries."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

from protocol import checks
from protocol.dataclass import dataclass, field
from protocol.limits import MAX_SPOOL, MIN_SPOOL
from protocol.pods import PodNamespace
from protocol.usage import RuntimeView


class StreamMode(StrEnum):
    """What stands behind a process's stdin, stdout, stderr or TTY."""

    NULL = "null"
    """/dev/null."""
    STREAM = "stream"
    """A pipe (or the pty) in the guest, moved by the kernel to whoever is attached."""
    SPOOL = "spool"
    """Kept in the guest, up to a limit, and read from there at any offset: stdout and stderr only."""
    FIFO = "fifo"
    """A named pipe in the guest, which somebody else there has the other end of; not for a TTY."""


class WhenFull(StrEnum):
    """What becomes of a spool that holds its limit."""

    BLOCK = "block"
    """The process waits until the client has acknowledged bytes: not one is lost."""
    DROP_OLDEST = "drop_oldest"
    """The oldest bytes make room for new ones: a log."""


class Status(StrEnum):
    """Where a container or process stands. FAILED: it could not be made and could not be cleaned up."""

    CREATING = "creating"
    """The runtime is at work; nothing can be done to it but wait for the answer."""
    CREATED = "created"
    """Init exists and waits for start."""
    RUNNING = "running"
    """Init (or the process) runs."""
    PAUSED = "paused"
    """Every process of the container is frozen; its processes' own status does not change."""
    STOPPED = "stopped"
    """Init (or the process) has ended; the record is kept."""
    DELETING = "deleting"
    """Being removed."""
    FAILED = "failed"
    """It could not be made and could not be cleaned up; delete it with force."""


class Reason(StrEnum):
    """Why a process is no more. LOST: it ended while nothing could see its status."""

    EXITED = "exited"
    """It returned or called exit."""
    SIGNALLED = "signalled"
    """A signal ended it."""
    OOM = "oom"
    """The kernel's out-of-memory killer ended it."""
    LOST = "lost"
    """It ended while nothing could see its status; ``exit_code`` is 255."""


@dataclass(frozen=True, slots=True)
class Winsize:
    """Size of a terminal in characters, as in ioctl_tty(2)."""

    rows: Annotated[int, checks.Between(0, 65535)] = 24
    """Lines."""
    cols: Annotated[int, checks.Between(0, 65535)] = 80
    """Characters in a line."""


@dataclass(frozen=True, slots=True)
class StreamSpec:
    """One stream of a process."""

    mode: StreamMode = StreamMode.NULL
    """What stands behind it."""
    limit: Annotated[int, checks.Between(MIN_SPOOL, MAX_SPOOL)] | None = None
    """For a spool: how many bytes it keeps; absent, 16 MiB."""
    when_full: WhenFull | None = None
    """For a spool: what happens beyond ``limit``; absent, ``block``."""
    tee: bool | None = None
    """For a spool: a log whose one client that is not passive is sent every byte before it is dropped."""
    path: checks.Path | None = None
    """For a fifo, and needed there: where it is in the guest, or is to be made."""


@dataclass(frozen=True, slots=True)
class Stdio:
    """The streams of a process.

    With ``terminal`` the process gets a pty: ``tty`` says what becomes of it and the other three must be
    null. Without, ``tty`` must be null. ``stdin_once`` ends stdin when the client attached to it goes.
    """

    stdin: StreamSpec = StreamSpec()
    """Towards the process."""
    stdout: StreamSpec = StreamSpec()
    """From the process."""
    stderr: StreamSpec = StreamSpec()
    """From the process."""
    tty: StreamSpec = StreamSpec()
    """The one duplex stream of a process with a terminal."""
    terminal: bool = False
    """Give it a pseudo-terminal."""
    winsize: Winsize = Winsize()
    """Size of the terminal at the start."""
    stdin_once: bool = False
    """End stdin when the client attached to it detaches."""

    def problem(self) -> str | None:
        """What is contradictory about it, or None."""
        pipes = (self.stdin, self.stdout, self.stderr)
        if self.terminal and any(spec.mode is not StreamMode.NULL for spec in pipes):
            return "with 'terminal' stdin, stdout and stderr must be null: the one stream is 'tty'"
        if not self.terminal and self.tty.mode is not StreamMode.NULL:
            return "'tty' needs 'terminal': true"
        if self.stdin_once and self.stdin.mode is StreamMode.FIFO:
            return "'stdin_once' is for a stream that clients attach to; end a fifo with process.close_stdin"
        return None


@dataclass(frozen=True, slots=True)
class Rusage:
    """What wait4(2) said the process and its waited-for children used. Times in microseconds."""

    user_us: int = 0
    """CPU time in user mode."""
    system_us: int = 0
    """CPU time in the kernel."""
    max_rss_kib: int = 0
    """Largest resident set."""
    minor_faults: int = 0
    """Page faults without I/O."""
    major_faults: int = 0
    """Page faults with I/O."""
    block_in: int = 0
    """Reads that reached a block device."""
    block_out: int = 0
    """Writes that reached a block device."""
    voluntary_switches: int = 0
    """Context switches while waiting."""
    involuntary_switches: int = 0
    """Context switches forced by the scheduler."""


class OomScope(StrEnum):
    """Which memory it was that ran out."""

    CONTAINER = "container"
    """What the container's own limit allows it, or that of a cgroup inside it."""
    ANCESTOR = "ancestor"
    """What the limit of a cgroup above the container's allows."""
    MACHINE = "machine"
    """The whole guest's."""
    UNKNOWN = "unknown"
    """The kernel's counters do not tell, and its log could not be read."""


@dataclass(frozen=True, slots=True)
class OomVictim:
    """A process the kernel killed."""

    pid: int
    """The one it had."""
    process: str = ""
    """Its id; empty for one that was neither init nor an exec: a child of theirs."""
    command: str = ""
    """What the kernel calls it: the first 15 bytes of its program's name, unless it has changed that."""


@dataclass(frozen=True, slots=True)
class Oom:
    """The kernel has killed processes of a container for want of memory: what it says of that."""

    scope: OomScope = OomScope.UNKNOWN
    """Which memory it was that ran out."""
    cgroup: str = ""
    """The container's, below the cgroup root."""
    limit_cgroup: str = ""
    """The one whose limit was reached; empty for ``machine``, and where it is not known."""
    kills: int = 0
    """Processes the kernel has killed in the container so far."""
    new: int = 0
    """Of them, those that this tells of."""
    victims: tuple[OomVictim, ...] = ()
    """Of these, the ones that are known; at most 16."""


@dataclass(frozen=True, slots=True)
class ExitRecord:
    """How a process ended; kept until the process is deleted.

    ``exit_code`` is what a shell would show: the status, or 128 + signal. ``streams`` holds, per stream,
    the bytes its process had produced (or taken) when it ended: a reader that has as many has all of it,
    even if some other process still holds the pipe open. A fifo's are not counted: it is not among them.
    """

    exit_code: int
    """The status, or 128 + signal."""
    signal: int
    """What ended it; 0 when it exited by itself."""
    reason: Reason
    """Why it is no more."""
    pid: int
    """The one it had."""
    started_at_ns: int
    """Since the epoch, by the guest's clock."""
    exited_at_ns: int
    """Likewise."""
    core_dumped: bool = False
    """As WCOREDUMP of wait(2)."""
    rusage: Rusage = Rusage()
    """What it used."""
    oom: Oom | None = None
    """What the event ``container.oom`` said of its end; for init, the last one of the container."""
    streams: dict[str, int] = field(default_factory=dict)
    """Bytes moved through each stream's process end when it ended, by stream name; 0 for a
    ``stdin``, ``stdout`` or ``stderr`` that is ``null``."""


@dataclass(frozen=True, slots=True)
class StreamState:
    """One stream now. ``bytes``: moved to or from clients so far; ``ended``: no more will come."""

    mode: StreamMode
    """As asked for."""
    bytes: int = 0
    """Moved to or from clients so far; for a TTY, its output; for a spool, taken into it."""
    attached: bool = False
    """A client is attached now."""
    ended: bool = False
    """No more will come."""
    first: int = 0
    """For a spool: offset of the oldest byte it keeps; ``bytes`` when it keeps none."""
    when_full: WhenFull | None = None
    """For a spool: as asked for."""
    path: str | None = None
    """For a fifo: where it is in the guest."""


@dataclass(frozen=True, slots=True)
class ProcessState:
    """One process of a container; ``process`` is ``init`` for its init. Times in ns since the epoch."""

    container: str
    process: str
    status: Status
    """Never ``failed`` while the process lives."""
    pid: int
    """0 when there is none (any more)."""
    args: tuple[str, ...] = ()
    """Its command line."""
    terminal: bool = False
    """It has a pseudo-terminal."""
    created_at_ns: int = 0
    """Since the epoch."""
    started_at_ns: int = 0
    """0 before it was started."""
    exit: ExitRecord | None = None
    """Present once it has ended."""
    streams: dict[str, StreamState] = field(default_factory=dict)
    """By stream name."""


@dataclass(frozen=True, slots=True)
class ContainerState:
    """One container and its processes, init first."""

    container: str
    status: Status
    """Where its life stands."""
    pid: int
    """Of init; 0 when there is none (any more)."""
    bundle: str
    """The directory in the guest with config.json."""
    created_at_ns: int
    """Since the epoch."""
    auto_delete: bool = False
    """As asked for."""
    problem: str = ""
    """For ``failed``: what could not be done, in one sentence."""
    labels: dict[str, str] = field(default_factory=dict)
    """As given to create."""
    runtime: str = ""
    """Name of the OCI runtime it was made with."""
    processes: tuple[ProcessState, ...] = ()
    """Init first, then in the order of exec."""
    runtime_view: RuntimeView | None = None
    """What the runtime says, if that was asked for."""
    process_count: int = 0
    """How many it has; more than ``processes`` where a list leaves them out."""
    pod: str = ""
    """The sandbox of its pod, which is itself for a sandbox; empty: it is in none."""
    share: tuple[PodNamespace, ...] = ()
    """What it shares with that sandbox."""
    cgroup: str = ""
    """Its cgroup, below the cgroup root; the pod's is the one above it."""


@dataclass(frozen=True, slots=True)
class BootStage:
    """A stage the guest's boot reached, in milliseconds since the kernel started."""

    stage: str
    """Its name, as in Boot stages."""
    uptime_ms: int
    """Since the kernel started."""


@dataclass(frozen=True, slots=True)
class MachineInfo:
    """The machine the agent runs on; what it does not tell is empty."""

    architecture: str = ""
    """As ``uname -m``."""
    processor: str = ""
    """Model name of its first CPU."""
    product: str = ""
    """Maker and name, as its firmware has them."""
    clocksource: str = ""
    """What its kernel reads the time from: ``kvm-clock``, ``tsc``, ``hpet``, ..."""
    command_line: str = ""
    """What its kernel was started with; outside a VM, empty."""


class UpgradeState(StrEnum):
    """How the last upgrade of the agent went."""

    NONE = "none"
    """There was none since the supervisor started."""
    TRYING = "trying"
    """The new code is being started, or has not proved itself yet."""
    PROMOTED = "promoted"
    """The new code runs and stays."""
    ROLLED_BACK = "rolled_back"
    """The new code did not do, and the code before it runs again."""


@dataclass(frozen=True, slots=True)
class UpgradeStatus:
    """The last upgrade of the agent, and what runs now."""

    state: UpgradeState = UpgradeState.NONE
    """How it went."""
    sha256: str = ""
    """Of the archive that was tried last; empty: none was."""
    error: str = ""
    """For ``rolled_back``: why, in one sentence."""
    running: str = ""
    """SHA-256 of the archive whose code runs; empty: what the image came with."""


@dataclass(frozen=True, slots=True)
class RuntimeInfo:
    """An OCI runtime: its name, where its binary is, its version and features."""

    name: str
    """``runc``, ``crun``, ...: what ``container.create`` takes."""
    path: str
    """In the guest; as configured, if it is not there."""
    version: str
    """First line of its ``--version``, or why there is none."""
    features: dict[str, Any] = field(default_factory=dict)
    """What its ``features`` command prints (OCI runtime spec); empty if not asked for or unknown."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened. ``seq`` grows by one per event; ``data`` depends on ``type`` (SPEC.md)."""

    seq: int
    """One more than the event before, also across restarts of the agent."""
    type: str
    """One of the types below; a client ignores those it does not know."""
    time_ns: int
    """Since the epoch, by the guest's clock."""
    container: str = ""
    """Empty when it concerns none."""
    process: str = ""
    """Empty when it concerns none."""
    data: dict[str, Any] = field(default_factory=dict)
    """Depends on the type."""
