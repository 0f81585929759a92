"""The method table: every request of the contract, its arguments, its result, its deadline.

Both sides look methods up here and nowhere else; nothing off the wire is ever used as an attribute name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any

from protocol import checks
from protocol.limits import Limits
from protocol.types import (
    BootStage,
    ContainerState,
    ContainerStats,
    ExitRecord,
    ProcessState,
    RuntimeInfo,
    Stdio,
    UpgradeStatus,
    Winsize,
)


class Stream(StrEnum):
    """Names a stream can be attached by."""

    STDIN = "stdin"
    STDOUT = "stdout"
    STDERR = "stderr"
    TTY = "tty"


class ShutdownAction(StrEnum):
    """What follows once the containers are stopped. EXIT is what a supervisor outside a VM does."""

    POWEROFF = "poweroff"
    """The VM is powered off."""
    REBOOT = "reboot"
    """The VM is rebooted."""
    EXIT = "exit"
    """The supervisor exits; the machine goes on."""


@dataclass(frozen=True, slots=True)
class Envelope:
    """What every request may carry beside its own arguments."""

    deadline_ms: checks.DeadlineMs | None = None
    """How long the request may take from its arrival; absent, the method's default."""
    request_id: checks.RequestId | None = None
    """Names a mutating request, so that sending it again does not do it again."""


@dataclass(frozen=True, slots=True)
class Empty:
    """No arguments, or nothing to say."""


@dataclass(frozen=True, slots=True)
class Hello:
    protocol_min: int
    """Oldest protocol version the client speaks."""
    protocol_max: int
    """Newest protocol version the client speaks."""
    client: str = ""
    """Name and version of the client, for the agent's log."""


@dataclass(frozen=True, slots=True)
class Welcome:
    """``generation`` counts agent starts under one supervisor; ``boot_id`` is the kernel's."""

    protocol: int
    """The version both speak from here on."""
    agent_version: str
    """Version of the agent's code, for people; behaviour follows ``features``."""
    boot_id: str
    """The kernel's boot id: a new one means that nothing from before exists any more."""
    generation: int
    """1 for the first agent since the supervisor started, one more after each restart."""
    features: tuple[str, ...] = ()
    """Optional parts of the contract this agent has, by name."""
    limits: Limits = Limits()
    """What the agent accepts from the client."""


@dataclass(frozen=True, slots=True)
class Pong:
    """``loop_lag_us``: how long the agent's event loop took to come round to this request's turn."""

    generation: int
    """As in hello."""
    uptime_ms: int
    """Since this agent process started."""
    loop_lag_us: int
    """How long the agent's event loop took to come round to this request."""


@dataclass(frozen=True, slots=True)
class Info:
    agent_version: str
    """As in hello."""
    generation: int
    """As in hello."""
    boot_id: str
    """As in hello."""
    hostname: str
    """The guest's host name."""
    kernel: str
    """Release of the guest's kernel, as ``uname -r``."""
    os: str
    """PRETTY_NAME of the guest's os-release."""
    python: str
    """Version of the Python that runs the agent."""
    cgroups: str
    """``v1``, ``v2`` or ``hybrid``."""
    runtime: RuntimeInfo
    """The OCI runtime."""
    containers: int
    """How many the agent knows, in any status."""
    processes: int
    """How many processes of containers are alive."""
    supervisor_pid: int
    """1 inside a VM."""
    agent_pid: int
    """Changes when the agent is restarted."""
    state_dir: str
    """Where the agent keeps its state in the guest."""
    time_ns: int
    """The guest's clock, since the epoch."""
    uptime_ms: int
    """Since the guest's kernel started."""
    memory_total_kib: int
    """MemTotal of /proc/meminfo."""
    memory_available_kib: int
    """MemAvailable of /proc/meminfo."""
    cpus: int
    """Online CPUs."""
    boot_stages: tuple[BootStage, ...] = ()
    """In the order they were reached; empty outside a VM."""
    build: dict[str, Any] = field(default_factory=dict)
    """What the image was stamped with: commit and package versions; empty outside a VM."""
    code: str = ""
    """SHA-256 of the uploaded archive whose code runs; empty: what the image came with."""


@dataclass(frozen=True, slots=True)
class Shutdown:
    """``grace_ms``: how long containers have between TERM and KILL."""

    action: ShutdownAction = ShutdownAction.POWEROFF
    """What follows once the containers are stopped."""
    grace_ms: Annotated[int, checks.Between(0, 600_000)] = 10_000
    """How long containers have between SIGTERM and SIGKILL."""


@dataclass(frozen=True, slots=True)
class Upload:
    """A part of an archive. The same bytes at the same offset may be sent any number of times."""

    upload_id: checks.Id
    """The caller's name for the upload."""
    offset: checks.Offset
    """Where ``data`` goes; not beyond what has arrived."""
    data: checks.Chunk
    """At most ``MAX_CHUNK`` bytes."""


@dataclass(frozen=True, slots=True)
class Uploaded:
    size: int
    """Bytes of this upload the guest has."""


@dataclass(frozen=True, slots=True)
class Upgrade:
    """``trial_ms``: how long the new code may take to be ready and alive."""

    upload_id: checks.Id
    """A complete upload: a tar or tar.gz with the packages ``gcsagent/`` and ``protocol/``."""
    sha256: checks.Sha256
    """Of the archive."""
    trial_ms: Annotated[int, checks.Between(1, 3_600_000)] = 30_000
    """How long the new code may take to be ready and alive; then the old code comes back."""


@dataclass(frozen=True, slots=True)
class Upgrading:
    generation: int
    """Of the first agent that runs the new code; the present one, if it does already."""


@dataclass(frozen=True, slots=True)
class AwaitUpgrade:
    wait: bool = False
    """Answer only when the upgrade under way has been promoted or rolled back."""


@dataclass(frozen=True, slots=True)
class Subscribe:
    """Events with a sequence number above ``after`` are replayed first; without it, only new ones come."""

    after: checks.Offset | None = None
    """Replay what the ring still holds with a greater ``seq``; absent, only new events come."""
    container: checks.Id | None = None
    """Only events of this container."""


@dataclass(frozen=True, slots=True)
class Subscribed:
    """``dropped``: events after ``after`` that had left the ring; ``last``: newest seq at this moment."""

    last: int
    """Newest ``seq`` at this moment; 0 before the first event."""
    dropped: int
    """How many events after ``after`` had already left the ring."""


@dataclass(frozen=True, slots=True)
class ContainerRef:
    container: checks.Id


@dataclass(frozen=True, slots=True)
class CreateContainer:
    """Exactly one of ``spec`` (an OCI runtime spec) and ``bundle`` (a directory holding config.json).

    ``overlay`` puts a throw-away writable layer over the root. ``auto_delete`` deletes the container once
    init has ended and no one is owed its output.
    """

    container: checks.Id
    """The new container's id."""
    spec: dict[str, Any] | None = None
    """An OCI runtime spec, as config.json holds it."""
    bundle: checks.Path | None = None
    """A directory in the guest holding config.json."""
    stdio: Stdio = Stdio()
    """What stands behind init's streams."""
    overlay: bool = False
    """Put a throw-away writable layer over the root file system."""
    auto_delete: bool = False
    """Delete it once init has ended and its output is taken."""
    labels: dict[str, str] = field(default_factory=dict)
    """Kept with the container and shown in its state; the agent reads none of them."""
    allow_vsock: bool = False
    """Leave AF_VSOCK, io_uring and 32-bit socketcall to the spec's own seccomp profile."""


@dataclass(frozen=True, slots=True)
class Created:
    pid: int
    """In the guest's pid namespace; for showing to people, never for sending signals."""


@dataclass(frozen=True, slots=True)
class ContainerList:
    containers: tuple[ContainerState, ...] = ()
    """In the order they were created."""


@dataclass(frozen=True, slots=True)
class KillContainer:
    """``all``: every process of the container, not just init."""

    container: checks.Id
    signal: checks.Signal = "SIGTERM"
    """What to send."""
    all: bool = False
    """To every process in the container, not just init."""


@dataclass(frozen=True, slots=True)
class UpdateContainer:
    """New limits; what is absent stays as it is. At least one must be there."""

    container: checks.Id
    memory_bytes: Annotated[int, checks.Between(1 << 20, 1 << 50)] | None = None
    """Memory it may use."""
    cpus: checks.Cpus | None = None
    """CPU time it may use, in CPUs: 0.5 is half of one."""
    pids: Annotated[int, checks.Between(1, 1 << 22)] | None = None
    """Processes and threads it may have."""


@dataclass(frozen=True, slots=True)
class DeleteContainer:
    """``force`` kills what still runs; without it a running container is left as it is."""

    container: checks.Id
    force: bool = False
    """Kill what still runs first; without it a running container is refused and left as it is."""


@dataclass(frozen=True, slots=True)
class Deleted:
    exit: ExitRecord | None = None
    """The last copy of the exit record, where there is one."""


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


@dataclass(frozen=True, slots=True)
class Attach:
    """``offset`` is for streams that can replay; ``take`` detaches whoever is attached now."""

    container: checks.Id
    process: checks.Id = checks.INIT
    stream: Stream = Stream.STDOUT
    """Which one; ``tty`` for a process with a terminal."""
    offset: checks.Offset | None = None
    """Where to begin, for a spool: any offset it keeps, or its end; absent, the oldest byte it keeps."""
    take: bool = False
    """Detach whoever is attached now, instead of being refused."""


@dataclass(frozen=True, slots=True)
class Attached:
    """``offset``: bytes of this stream moved before this connection; for a TTY the guest's output."""

    offset: int
    """Bytes of this stream moved before this connection; for a TTY, of its output; for a spool, where the
    bytes that follow begin."""


@dataclass(frozen=True, slots=True)
class Ack:
    """The client has what comes before ``offset`` and will never ask for it again."""

    container: checks.Id
    process: checks.Id = checks.INIT
    stream: Stream = Stream.STDOUT
    """A spool."""
    offset: checks.Offset = 0
    """Bytes before this one may be released."""


@dataclass(frozen=True, slots=True)
class Find:
    """Where in a spool to begin reading: at the later of what ``since_ns`` and ``tail`` say."""

    container: checks.Id
    process: checks.Id = checks.INIT
    stream: Stream = Stream.STDOUT
    """A spool."""
    since_ns: checks.Offset | None = None
    """The first bytes written at or after this time, since the epoch, by the guest's clock."""
    tail: checks.Offset | None = None
    """This many lines before the end; what follows the last newline is a line."""


@dataclass(frozen=True, slots=True)
class Found:
    offset: int
    """Where to attach."""
    first: int
    """Oldest byte kept."""
    end: int
    """Bytes taken into the spool so far."""


@dataclass(frozen=True, slots=True)
class Method:
    """One request of the contract.

    ``deadline_ms`` is what applies when the caller names none; None means unbounded. ``mutating`` methods
    may carry a ``request_id``, and ``commit`` says from when on success wins over cancel and deadline.
    """

    name: str
    params: type
    result: type
    deadline_ms: int | None
    mutating: bool = False
    commit: str = ""


_QUICK, _RUNTIME, _LONG = 10_000, 60_000, 120_000

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("agent.hello", Hello, Welcome, _QUICK),
        Method("agent.ping", Empty, Pong, _QUICK),
        Method("agent.info", Empty, Info, _QUICK),
        Method("agent.shutdown", Shutdown, Empty, _QUICK, True, "the supervisor has been told"),
        Method("agent.upload", Upload, Uploaded, _QUICK, True, "the bytes are being written"),
        Method("agent.upgrade", Upgrade, Upgrading, _LONG, True, "the supervisor is being told"),
        Method("agent.upgrade_status", AwaitUpgrade, UpgradeStatus, None),
        Method("events.subscribe", Subscribe, Subscribed, _QUICK),
        Method("container.create", CreateContainer, Created, _RUNTIME, True, "runc create has succeeded"),
        Method("container.start", ContainerRef, Created, _RUNTIME, True, "runc start has succeeded"),
        Method("container.state", ContainerRef, ContainerState, _QUICK),
        Method("container.list", Empty, ContainerList, _QUICK),
        Method("container.kill", KillContainer, Empty, _RUNTIME, True, "the signal has been sent"),
        Method("container.pause", ContainerRef, Empty, _RUNTIME, True, "runc pause has succeeded"),
        Method("container.resume", ContainerRef, Empty, _RUNTIME, True, "runc resume has succeeded"),
        Method("container.update", UpdateContainer, Empty, _RUNTIME, True, "runc update has succeeded"),
        Method("container.stats", ContainerRef, ContainerStats, _QUICK),
        Method("container.wait", ContainerRef, ExitRecord, None),
        Method("container.delete", DeleteContainer, Deleted, _LONG, True, "runc delete has begun"),
        Method("process.exec", Exec, Created, _RUNTIME, True, "runc exec has succeeded"),
        Method("process.state", ProcessRef, ProcessState, _QUICK),
        Method("process.kill", KillProcess, Empty, _QUICK, True, "the signal has been sent"),
        Method("process.resize", Resize, Empty, _QUICK, True, "the ioctl has been made"),
        Method("process.close_stdin", CloseStdin, Empty, _QUICK, True, "the end has been noted"),
        Method("process.wait", ProcessRef, ExitRecord, None),
        Method("process.delete", ProcessRef, Deleted, _RUNTIME, True, "the record has been removed"),
        Method("stream.attach", Attach, Attached, _QUICK),
        Method("stream.ack", Ack, Empty, _QUICK, True, "the bytes have been released"),
        Method("stream.find", Find, Found, _RUNTIME),
    )
}

HELLO, ATTACH = "agent.hello", "stream.attach"

CANCEL = "rpc.cancel"
"""Notification from the client: ``{msgid}``; the request it names ends with CANCELLED if it still can."""

EVENT = "event"
"""Notification to a subscriber: one :class:`protocol.types.Event`."""

PROTOCOL_ERROR = "rpc.error"
"""Notification before a connection is closed for what its peer sent: ``{kind, message}``."""


@dataclass(frozen=True, slots=True)
class Cancel:
    msgid: int
    """Of the request to end, on this connection."""
