"""A guest's clock against this host's: measured as NTP does (RFC 5905, section 8), and set by that.

Of several round trips the shortest says most: what a reading may be off by is half of what the trip took
beyond the guest's own part.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from gcsagent.host.client import Client
from protocol.families.guest import ClockChange, GuestTime, SetTime, TimeSet
from protocol.method import Empty

SAMPLES = 8
STEPS = 3
"""How often a step is repeated that left more than can be measured: the host's clock may be moving, too."""


@dataclass(frozen=True, slots=True)
class ClockOffset:
    """``offset_ns`` is the guest's clock minus the host's, right to within ``error_ns`` either way."""

    offset_ns: int
    error_ns: int
    round_trip_ns: int
    """Of the shortest of the ``samples`` round trips, without the guest's own part."""
    samples: int
    slewing_ns: int
    """What the guest's kernel still has to slew."""


@dataclass(frozen=True, slots=True)
class ClockSync:
    """A clock measured, set and measured again."""

    how: ClockChange
    before: ClockOffset
    after: ClockOffset


async def measure(client: Client, samples: int = SAMPLES) -> ClockOffset:
    """Raises what Client.call raises."""
    found = [await _sample(client) for _ in range(max(1, samples))]
    offset, round_trip, slewing = min(found, key=lambda each: each[1])
    return ClockOffset(offset, (round_trip + 1) // 2, round_trip, len(found), slewing)


async def sync(client: Client, how: ClockChange = ClockChange.STEP, samples: int = SAMPLES) -> ClockSync:
    """Sets the guest's clock to this host's. A slew has only begun when this returns.

    Raises what Client.call raises: FAILED_PRECONDITION outside a guest, INVALID_ARGUMENT for a slew of more
    than MAX_SLEW_NS.
    """
    before = after = await measure(client, samples)
    for _ in range(STEPS):
        await client.call("guest.set_time", SetTime(offset_ns=-after.offset_ns, how=how))
        after = await measure(client, samples)
        if how is ClockChange.SLEW or abs(after.offset_ns) <= 2 * (before.error_ns + after.error_ns):
            break
    return ClockSync(how, before, after)


async def set_time(client: Client, time_ns: int) -> TimeSet:
    """Sets the guest's clock to a time of one's own."""
    result: TimeSet = await client.call("guest.set_time", SetTime(time_ns=time_ns))
    return result


async def _sample(client: Client) -> tuple[int, int, int]:
    """Offset, round trip, and what is left of a slew. The trip is timed by a clock that nobody sets."""
    sent, begun = time.time_ns(), time.monotonic_ns()
    reading: GuestTime = await client.call("guest.time", Empty())
    elapsed = time.monotonic_ns() - begun
    offset = ((reading.received_ns - sent) + (reading.sent_ns - (sent + elapsed))) // 2
    return offset, max(0, elapsed - max(0, reading.sent_ns - reading.received_ns)), reading.slewing_ns
