"""``guest.*``: the machine the agent is in. What changes it is refused outside a guest."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from protocol import checks
from protocol.dataclass import dataclass
from protocol.method import QUICK, RUNTIME, Empty, Method

MAX_ENTROPY = 4096
MAX_SLEW_NS = 10_000_000_000


def random_bytes(value: bytes) -> str | None:
    return None if 1 <= len(value) <= MAX_ENTROPY else f"must be 1 to {MAX_ENTROPY} bytes, not {len(value)}"


class ClockChange(StrEnum):
    """How a clock gets from one time to another."""

    STEP = "step"
    """At once: what measures with the wall clock sees it jump."""
    SLEW = "slew"
    """Half a millisecond a second, and never backwards; a step ends it."""


@dataclass(frozen=True, slots=True)
class GuestTime:
    """Both ends of the guest's part of a round trip, as NTP (RFC 5905) has them."""

    received_ns: int
    """The guest's clock when the agent took up the request."""
    sent_ns: int
    """The guest's clock when the answer was made."""
    boottime_ns: int
    """Since the guest's kernel started, its suspensions included (CLOCK_BOOTTIME)."""
    slewing_ns: int
    """What is left of a slew; 0 when there is none."""


@dataclass(frozen=True, slots=True)
class SetTime:
    """Exactly one of ``time_ns`` and ``offset_ns``."""

    time_ns: int | None = None
    """What the clock shall show, since 1970; for a step only."""
    offset_ns: int | None = None
    """What the clock shall be moved by."""
    how: ClockChange = ClockChange.STEP
    """A slew is of 10 seconds at most."""


@dataclass(frozen=True, slots=True)
class TimeSet:
    before_ns: int
    """The clock right before."""
    after_ns: int
    """The clock right after."""
    slewing_ns: int
    """What is now left to slew."""


@dataclass(frozen=True, slots=True)
class Entropy:
    """The kernel's random number generator."""

    available_bits: int
    """``entropy_avail``: all of ``pool_bits`` once the generator is initialised."""
    pool_bits: int
    """``poolsize``."""
    source: str = ""
    """The hardware generator that feeds the kernel, such as ``virtio_rng.0``; empty if there is none."""


@dataclass(frozen=True, slots=True)
class AddEntropy:
    data: Annotated[bytes, random_bytes]
    """Random bytes."""
    bits: Annotated[int, checks.Between(0, 8 * MAX_ENTROPY)] | None = None
    """What they are worth, at most 8 each; absent, 8 each."""
    reseed: bool = True
    """Make the generator draw new keys now rather than within a minute."""


@dataclass(frozen=True, slots=True)
class CpuLists:
    """As the kernel writes lists: ``0-2,7``; empty for none."""

    possible: str
    """What the kernel has room for."""
    present: str
    """What has been plugged in."""
    online: str
    """What runs processes."""


@dataclass(frozen=True, slots=True)
class MemoryBlocks:
    """The guest's memory in the blocks in which it is plugged, which are numbered (sysfs, memory)."""

    total_kib: int
    """MemTotal of /proc/meminfo: what is online, less what the kernel took for itself."""
    available_kib: int
    """MemAvailable of /proc/meminfo."""
    block_bytes: int
    """Size of each; 0 in a kernel that cannot plug memory."""
    online: str
    """The numbers of those in use, as ``0-2,7``."""
    offline: str
    """The numbers of those that are there and not in use."""


class PressureResource(StrEnum):
    """What is waited for (PSI)."""

    MEMORY = "memory"
    """Memory: reclaim, swap, pages read again."""
    CPU = "cpu"
    """A CPU."""
    IO = "io"
    """Block devices."""


class PressureKind(StrEnum):
    """Who waits (PSI)."""

    SOME = "some"
    """At least one process."""
    FULL = "full"
    """All that are not idle, at once."""


@dataclass(frozen=True, slots=True)
class WatchPressure:
    """Processes stalled for ``stall_us`` within ``window_us``."""

    watch: checks.Id
    """The caller's name for it, in the events."""
    resource: PressureResource = PressureResource.MEMORY
    """What is waited for."""
    kind: PressureKind = PressureKind.SOME
    """Who waits."""
    stall_us: Annotated[int, checks.Between(1, 10_000_000)] = 150_000
    """So much waiting, of any length each."""
    window_us: Annotated[int, checks.Between(500_000, 10_000_000)] = 1_000_000
    """Within so much time; there is one event per window at most."""
    container: checks.Id | None = None
    """The processes of this container; absent, all of the guest."""


@dataclass(frozen=True, slots=True)
class PressureRef:
    watch: checks.Id
    """As in ``guest.watch_pressure``."""


@dataclass(frozen=True, slots=True)
class Resources:
    cpus: CpuLists
    """By number."""
    memory: MemoryBlocks
    """By number of block."""
    pressure_watches: tuple[WatchPressure, ...] = ()
    """What ``guest.watch_pressure`` has been asked for and still watches."""


@dataclass(frozen=True, slots=True)
class Online:
    """Without ``cpus`` and ``memory``: everything that is there and offline."""

    cpus: checks.Cpuset | None = None
    """These CPUs, waited for if they are not there yet."""
    memory: checks.Cpuset | None = None
    """These blocks of memory, likewise."""
    wait_ms: Annotated[int, checks.Between(0, 600_000)] = 5000
    """How long to wait for those that are not there."""


METHODS = (
    Method("guest.time", Empty, GuestTime, QUICK),
    Method("guest.set_time", SetTime, TimeSet, QUICK, True, "the clock has been set"),
    Method("guest.entropy", Empty, Entropy, QUICK),
    Method("guest.add_entropy", AddEntropy, Entropy, QUICK, True, "the kernel has the bytes"),
    Method("guest.resources", Empty, Resources, QUICK),
    Method("guest.online", Online, Resources, RUNTIME, True, "all of them are online"),
    Method("guest.watch_pressure", WatchPressure, Empty, QUICK, True, "the supervisor holds the trigger"),
    Method("guest.unwatch_pressure", PressureRef, Empty, QUICK, True, "the trigger has been released"),
)
