"""``container.checkpoint``, ``container.restore`` and ``checkpoint.*``: a container's processes as files."""

from __future__ import annotations

from protocol import checks
from protocol.dataclass import dataclass, field
from protocol.families.container import Created
from protocol.method import LONG, QUICK, Empty, Method


@dataclass(frozen=True, slots=True)
class MakeCheckpoint:
    """The options from ``tcp_established`` on are CRIU's, and hold for the restore as well."""

    container: checks.Id
    checkpoint: checks.Id
    """The new checkpoint's id."""
    leave_running: bool = False
    """Let the container run on; without it, it ends as soon as it has been saved."""
    tcp_established: bool = False
    """Save established TCP connections; without it, a container that has one is refused."""
    ext_unix_sk: bool = False
    """Allow unix sockets connected to something outside the container."""
    shell_job: bool = False
    """Allow a process whose session or terminal is of a shell outside the container."""
    file_locks: bool = False
    """Save file locks; without it, a container that holds one is refused."""
    path: checks.Path | None = None
    """A directory to be made for it in the guest; absent: one below the agent's state directory."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A container that was saved."""

    checkpoint: str
    """Its id."""
    container: str
    """The container that was saved."""
    path: str
    """Its directory in the guest."""
    created_at_ns: int
    """Since the epoch, by the guest's clock."""
    size_bytes: int
    """Of its files."""
    leave_running: bool
    """The container ran on."""
    tcp_established: bool = False
    """As asked for, as are the following."""
    ext_unix_sk: bool = False
    """Unix sockets to the outside."""
    shell_job: bool = False
    """A session or terminal from outside."""
    file_locks: bool = False
    """File locks."""
    overlay: bool = False
    """It holds the throw-away layer of the container's root."""
    runtime: str = ""
    """Name of the OCI runtime, which the restored container has, too."""
    runtime_version: str = ""
    """First line of its ``--version``."""
    criu_version: str = ""
    """CRIU's."""
    streams: dict[str, int] = field(default_factory=dict)
    """Where the streams of a container restored from it go on, by stream name."""


@dataclass(frozen=True, slots=True)
class Restore:
    """Exactly one of ``checkpoint`` and ``path``."""

    checkpoint: checks.Id | None = None
    """Id of one that ``checkpoint.list`` shows."""
    path: checks.Path | None = None
    """Directory of one that this agent need not have made."""
    container: checks.Id | None = None
    """The new container's id; absent: that of the container that was saved."""
    auto_delete: bool | None = None
    """As in create; absent: as it was."""
    labels: dict[str, str] | None = None
    """As in create; absent: as they were."""


@dataclass(frozen=True, slots=True)
class CheckpointList:
    checkpoints: tuple[Checkpoint, ...] = ()
    """In the order they were made."""


@dataclass(frozen=True, slots=True)
class CheckpointRef:
    checkpoint: checks.Id
    """Which checkpoint."""


METHODS = (
    Method("container.checkpoint", MakeCheckpoint, Checkpoint, LONG, True, "runc checkpoint has begun"),
    Method("container.restore", Restore, Created, LONG, True, "runc restore has succeeded"),
    Method("checkpoint.list", Empty, CheckpointList, QUICK),
    Method("checkpoint.delete", CheckpointRef, Empty, LONG, True, "it is none any more"),
)
