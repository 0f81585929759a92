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
    ExitRecord,
    ProcessState,
    RuntimeInfo,
    Stdio,
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
    REBOOT = "reboot"
    EXIT = "exit"


@dataclass(frozen=True, slots=True)
class Envelope:
    """What every request may carry beside its own arguments."""

    deadline_ms: checks.DeadlineMs | None = None
    request_id: checks.RequestId | None = None


@dataclass(frozen=True, slots=True)
class Empty:
    """No arguments, or nothing to say."""


@dataclass(frozen=True, slots=True)
class Hello:
    protocol_min: int
    protocol_max: int
    client: str = ""


@dataclass(frozen=True, slots=True)
class Welcome:
    """``generation`` counts agent starts under one supervisor; ``boot_id`` is the kernel's."""

    protocol: int
    agent_version: str
    boot_id: str
    generation: int
    features: tuple[str, ...] = ()
    limits: Limits = Limits()


@dataclass(frozen=True, slots=True)
class Pong:
    """``loop_lag_us``: how long the agent's event loop took to come round to this request's turn."""

    generation: int
    uptime_ms: int
    loop_lag_us: int


@dataclass(frozen=True, slots=True)
class Info:
    agent_version: str
    generation: int
    boot_id: str
    hostname: str
    kernel: str
    os: str
    python: str
    cgroups: str
    runtime: RuntimeInfo
    containers: int
    processes: int
    supervisor_pid: int
    agent_pid: int
    state_dir: str
    time_ns: int
    uptime_ms: int
    memory_total_kib: int
    memory_available_kib: int
    cpus: int
    boot_stages: tuple[BootStage, ...] = ()
    build: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Shutdown:
    """``grace_ms``: how long containers have between TERM and KILL."""

    action: ShutdownAction = ShutdownAction.POWEROFF
    grace_ms: Annotated[int, checks.between(0, 600_000)] = 10_000


@dataclass(frozen=True, slots=True)
class Subscribe:
    """Events with a sequence number above ``after`` are replayed first; without it, only new ones come."""

    after: checks.Offset | None = None
    container: checks.Id | None = None


@dataclass(frozen=True, slots=True)
class Subscribed:
    """``dropped``: events after ``after`` that had left the ring; ``last``: newest seq at this moment."""

    last: int
    dropped: int


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
    spec: dict[str, Any] | None = None
    bundle: checks.Path | None = None
    stdio: Stdio = Stdio()
    overlay: bool = False
    auto_delete: bool = False
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Created:
    pid: int


@dataclass(frozen=True, slots=True)
class ContainerList:
    containers: tuple[ContainerState, ...] = ()


@dataclass(frozen=True, slots=True)
class KillContainer:
    """``all``: every process of the container, not just init."""

    container: checks.Id
    signal: checks.Signal = "SIGTERM"
    all: bool = False


@dataclass(frozen=True, slots=True)
class DeleteContainer:
    """``force`` kills what still runs; without it a running container is left as it is."""

    container: checks.Id
    force: bool = False


@dataclass(frozen=True, slots=True)
class Deleted:
    exit: ExitRecord | None = None


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
    spec: dict[str, Any]
    stdio: Stdio = Stdio()
    auto_delete: bool = False


@dataclass(frozen=True, slots=True)
class KillProcess:
    container: checks.Id
    process: checks.Id = checks.INIT
    signal: checks.Signal = "SIGTERM"


@dataclass(frozen=True, slots=True)
class Resize:
    container: checks.Id
    process: checks.Id = checks.INIT
    winsize: Winsize = Winsize()


@dataclass(frozen=True, slots=True)
class CloseStdin:
    """Ends stdin once ``offset`` bytes of it have reached the process's pipe; without it, at once."""

    container: checks.Id
    process: checks.Id = checks.INIT
    offset: checks.Offset | None = None


@dataclass(frozen=True, slots=True)
class Attach:
    """``offset`` is for streams that can replay; ``take`` detaches whoever is attached now."""

    container: checks.Id
    process: checks.Id = checks.INIT
    stream: Stream = Stream.STDOUT
    offset: checks.Offset | None = None
    take: bool = False


@dataclass(frozen=True, slots=True)
class Attached:
    """``offset``: bytes of this stream moved before this connection; for a TTY the guest's output."""

    offset: int


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
        Method("events.subscribe", Subscribe, Subscribed, _QUICK),
        Method("container.create", CreateContainer, Created, _RUNTIME, True, "runc create has succeeded"),
        Method("container.start", ContainerRef, Created, _RUNTIME, True, "runc start has succeeded"),
        Method("container.state", ContainerRef, ContainerState, _QUICK),
        Method("container.list", Empty, ContainerList, _QUICK),
        Method("container.kill", KillContainer, Empty, _RUNTIME, True, "the signal has been sent"),
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
