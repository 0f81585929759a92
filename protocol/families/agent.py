"""``agent.*``: the agent itself."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

from protocol import checks
from protocol.dataclass import dataclass, field
from protocol.limits import Limits
from protocol.method import LONG, QUICK, Empty, Method
from protocol.types import BootStage, MachineInfo, RuntimeInfo, UpgradeStatus


class ShutdownAction(StrEnum):
    """What follows once the containers are stopped. EXIT is what a supervisor outside a VM does."""

    POWEROFF = "poweroff"
    """The VM is powered off."""
    REBOOT = "reboot"
    """The VM is rebooted."""
    EXIT = "exit"
    """The supervisor exits; the machine goes on."""


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
class AskInfo:
    features: bool = False
    """Also what the runtimes say they can do."""


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
    """The OCI runtime a container gets that asks for none."""
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
    """What the image was stamped with: its ``key``, commit and package versions; empty outside a VM."""
    code: str = ""
    """SHA-256 of the uploaded archive whose code runs; empty: what the image came with."""
    runtimes: tuple[RuntimeInfo, ...] = ()
    """Every OCI runtime that ``container.create`` may name, the default first."""
    protocol_min: int = 0
    """Oldest protocol version the agent speaks."""
    protocol_max: int = 0
    """Newest protocol version the agent speaks."""
    features: tuple[str, ...] = ()
    """As in hello."""
    limits: Limits = Limits()
    """As in hello."""
    msgpack: str = ""
    """Version of the agent's msgpack library, and what it is written in."""
    machine: MachineInfo = MachineInfo()
    """The machine under all of it."""


@dataclass(frozen=True, slots=True)
class Shutdown:
    """``grace_ms``: how long containers have between TERM and KILL."""

    action: ShutdownAction = ShutdownAction.POWEROFF
    """What follows once the containers are stopped."""
    grace_ms: Annotated[int, checks.Between(0, 600_000)] = 10_000
    """How long containers have between SIGTERM and SIGKILL."""


@dataclass(frozen=True, slots=True)
class Upgrade:
    """``trial_ms``: how long the new code may take to be ready and alive."""

    sha256: checks.Sha256
    """Of the archive, in small letters: the name of the file that it is in."""
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


METHODS = (
    Method("agent.hello", Hello, Welcome, QUICK),
    Method("agent.ping", Empty, Pong, QUICK),
    Method("agent.info", AskInfo, Info, QUICK),
    Method("agent.shutdown", Shutdown, Empty, QUICK, True, "the supervisor has been told"),
    Method("agent.upgrade", Upgrade, Upgrading, LONG, True, "the supervisor is being told"),
    Method("agent.upgrade_status", AwaitUpgrade, UpgradeStatus, None),
)
