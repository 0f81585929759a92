"""``guest.snapshot_*``: a guest holds still around a snapshot of its VM, and goes on afterwards."""

from __future__ import annotations

from typing import Annotated

from protocol import checks
from protocol.dataclass import dataclass
from protocol.families.guest import random_bytes
from protocol.method import LONG, Method


@dataclass(frozen=True, slots=True)
class PrepareSnapshot:
    snapshot: checks.Id
    """The caller's name for it."""
    hold_ms: Annotated[int, checks.Between(100, 600_000)] = 60_000
    """By the guest's clock: it goes on by itself after so long, should nobody ask for it."""
    wait_ms: Annotated[int, checks.Between(0, 600_000)] = 30_000
    """How long requests that are under way may take to end."""


@dataclass(frozen=True, slots=True)
class SnapshotHeld:
    snapshot: checks.Id
    """As asked."""
    hold_ms: int
    """What is left of it."""
    frozen: tuple[str, ...] = ()
    """Ids of the mounts that have been frozen for it."""


@dataclass(frozen=True, slots=True)
class ResumeSnapshot:
    snapshot: checks.Id
    """As in ``guest.snapshot_prepare``."""
    offset_ns: int | None = None
    """What the guest's clock shall be moved by, at once; absent, it is left alone."""
    seed: Annotated[bytes, random_bytes] | None = None
    """Random bytes of this VM's own, credited 8 bits each; new keys are drawn from them before anything goes
    on."""


@dataclass(frozen=True, slots=True)
class SnapshotResumed:
    snapshot: checks.Id
    """As asked."""
    held: bool
    """Whether the guest was still held for it; if not, it had gone on before."""
    thawed: tuple[str, ...] = ()
    """Ids of the mounts that were thawed."""
    stepped_ns: int = 0
    """What the clock was moved by."""
    reseeded: bool = False
    """Whether the random number generator has new keys."""


METHODS = (
    Method("guest.snapshot_prepare", PrepareSnapshot, SnapshotHeld, LONG, True, "the guest is held"),
    Method("guest.snapshot_resume", ResumeSnapshot, SnapshotResumed, LONG, True, "the clock is set"),
)

PASSING = frozenset(
    {
        "guest.snapshot_prepare",
        "guest.snapshot_resume",
        "guest.set_time",
        "guest.add_entropy",
        "agent.shutdown",
        "agent.log_level",
        "stream.ack",
        "forward.close_write",
        "process.close_stdin",
        "process.resize",
    }
)
"""Methods that change something and are carried out all the same while the guest is held: what streams that
are open need, and what ends the hold."""
