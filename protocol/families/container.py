"""``container.*``: one container's life."""

from __future__ import annotations

from typing import Annotated, Any

from protocol import checks
from protocol.dataclass import dataclass, field
from protocol.limits import MAX_PAGE
from protocol.method import LONG, QUICK, RUNTIME, Empty, Method
from protocol.pods import PodMember, Sandbox
from protocol.types import ContainerState, ExitRecord, Stdio
from protocol.usage import ContainerProcess, ContainerStats, IoLimit


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
    labels: checks.Labels = field(default_factory=dict)
    """Kept with the container and shown in its state; the agent reads none of them."""
    runtime: str = ""
    """Name of one of the agent's OCI runtimes (``agent.info``); empty: the default."""
    allow_vsock: bool = False
    """Leave AF_VSOCK, io_uring and 32-bit socketcall to the spec's own seccomp profile."""
    sandbox: Sandbox | None = None
    """Make it the sandbox of a new pod, which has its id."""
    pod: PodMember | None = None
    """Put it into the pod of this sandbox; not with ``sandbox``."""


@dataclass(frozen=True, slots=True)
class Created:
    pid: int
    """In the guest's pid namespace; for showing to people, never for sending signals."""


@dataclass(frozen=True, slots=True)
class ListContainers:
    """One page of the containers; the next is asked for ``after`` the last id of this one."""

    processes: bool = True
    """Each with its processes; without, only how many it has."""
    after: str = ""
    """Only containers whose id sorts behind this, byte by byte."""
    limit: Annotated[int, checks.Between(1, MAX_PAGE)] = MAX_PAGE
    """At most so many."""


@dataclass(frozen=True, slots=True)
class ContainerList:
    containers: tuple[ContainerState, ...] = ()
    """By id."""
    left_out: int = 0
    """How many there are beyond these: more than ``limit``, or than a message holds."""


@dataclass(frozen=True, slots=True)
class StateContainer:
    container: checks.Id
    ask_runtime: bool = False
    """Ask the runtime, too, which takes a run of it."""


@dataclass(frozen=True, slots=True)
class ListProcesses:
    """One page of a container's processes; the next is asked for ``after`` the last pid of this one."""

    container: checks.Id
    after: Annotated[int, checks.Between(0, 1 << 22)] = 0
    """Only processes with a higher pid."""
    limit: Annotated[int, checks.Between(1, MAX_PAGE)] = MAX_PAGE
    """At most so many."""


@dataclass(frozen=True, slots=True)
class ProcessList:
    processes: tuple[ContainerProcess, ...] = ()
    """By pid."""
    left_out: int = 0
    """How many there are beyond these: more than ``limit``, or than a message holds."""


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
    """New limits; what is absent stays as it is. At least one must be there; -1 takes one away."""

    container: checks.Id
    memory_bytes: Annotated[int, checks.Limit(1 << 20, 1 << 50)] | None = None
    """Memory it may use."""
    memory_swap_bytes: Annotated[int, checks.Limit(1 << 20, 1 << 50)] | None = None
    """Memory and swap together that it may use; needs a limit on memory, which it may not be below."""
    memory_reservation_bytes: Annotated[int, checks.Between(1 << 20, 1 << 50)] | None = None
    """Memory that is taken from it last when the guest runs short (`memory.low`; v1: the soft limit)."""
    cpus: checks.Cpus | None = None
    """CPU time it may use, in CPUs: 0.5 is half of one."""
    cpu_shares: Annotated[int, checks.Between(2, 1 << 18)] | None = None
    """Its part of the CPU time when there is not enough; 1024 is the usual one. v2 has a weight: runc
    converts."""
    cpuset_cpus: checks.Cpuset | None = None
    """CPUs it may run on, like `0-2,7`."""
    cpuset_mems: checks.Cpuset | None = None
    """Memory nodes it may use, likewise."""
    pids: Annotated[int, checks.Limit(1, 1 << 22)] | None = None
    """Processes and threads it may have."""
    io_weight: Annotated[int, checks.Between(10, 1000)] | None = None
    """Its part of the I/O when there is not enough; 500 is the usual one. Few kernels have it."""
    io: tuple[IoLimit, ...] = ()
    """Limits for devices; a device that is not named keeps its own."""


@dataclass(frozen=True, slots=True)
class DeleteContainer:
    """``force`` kills what still runs; without it a running container is left as it is."""

    container: checks.Id
    force: bool = False
    """Kill what still runs first, and the containers of its pod before a sandbox; without it a running
    container is refused and left as it is."""


@dataclass(frozen=True, slots=True)
class Deleted:
    exit: ExitRecord | None = None
    """The last copy of the exit record, where there is one."""


METHODS = (
    Method("container.create", CreateContainer, Created, RUNTIME, True, "runc create has succeeded"),
    Method("container.start", ContainerRef, Created, RUNTIME, True, "runc start has succeeded"),
    Method("container.state", StateContainer, ContainerState, QUICK),
    Method("container.list", ListContainers, ContainerList, QUICK),
    Method("container.processes", ListProcesses, ProcessList, QUICK),
    Method("container.kill", KillContainer, Empty, RUNTIME, True, "the signal has been sent"),
    Method("container.pause", ContainerRef, Empty, RUNTIME, True, "runc pause has succeeded"),
    Method("container.resume", ContainerRef, Empty, RUNTIME, True, "runc resume has succeeded"),
    Method("container.update", UpdateContainer, Empty, RUNTIME, True, "runc update has succeeded"),
    Method("container.stats", ContainerRef, ContainerStats, QUICK),
    Method("container.wait", ContainerRef, ExitRecord, None),
    Method("container.delete", DeleteContainer, Deleted, LONG, True, "runc delete has begun"),
)
