"""``guest.*``: the machine the agent is in. What changes it is refused outside a guest."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from protocol import checks
from protocol.method import QUICK, Empty, Method

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


METHODS = (
    Method("guest.time", Empty, GuestTime, QUICK),
    Method("guest.set_time", SetTime, TimeSet, QUICK, True, "the clock has been set"),
    Method("guest.entropy", Empty, Entropy, QUICK),
    Method("guest.add_entropy", AddEntropy, Entropy, QUICK, True, "the kernel has the bytes"),
)
