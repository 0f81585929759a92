"""The guest's part of a snapshot, by way of a client: it holds still, and goes on.

    async with held(client, "nightly"):
        ...stop the VM, copy its memory and disks, let it go on...

What goes on is given this host's time and random bytes that no other copy gets, whether it is the VM of
before or one made from the snapshot.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from gcsagent.host import clock
from gcsagent.host.client import Client
from gcsagent.host.clock import ClockOffset
from protocol.families.snapshot import PrepareSnapshot, ResumeSnapshot, SnapshotHeld, SnapshotResumed

HOLD_SECONDS, WAIT_SECONDS = 60.0, 30.0
SEED_BYTES = 64
"""Twice what the kernel's generator holds."""


@dataclass(frozen=True, slots=True)
class Resumed:
    """What the guest did, and its clock afterwards; None if that was left alone."""

    done: SnapshotResumed
    clock: ClockOffset | None


async def prepare(
    client: Client, snapshot: str, *, hold: float = HOLD_SECONDS, wait: float = WAIT_SECONDS
) -> SnapshotHeld:
    """Holds the guest, for ``hold`` seconds at most; asked again under the same name, so long from then on.

    ``wait``: seconds that requests under way may take to end.

    Raises what :meth:`Client.call` raises: FAILED_PRECONDITION when they do not, when another snapshot is
    being made, or when a file system cannot be frozen; the guest is not held then.
    """
    asked = PrepareSnapshot(snapshot, round(hold * 1000), round(wait * 1000))
    answer: SnapshotHeld = await client.call("guest.snapshot_prepare", asked)
    return answer


async def resume(client: Client, snapshot: str, *, machine: bool = True) -> Resumed:
    """Has the guest go on, with this host's time and new random bytes. One that was not held gets them, too.

    ``machine``: False leaves the clock and the random number generator alone, which an agent that is no
    guest's refuses to change.

    Raises what :meth:`Client.call` raises: FAILED_PRECONDITION when it is held for another snapshot.
    """
    if not machine:
        return Resumed(await _resume(client, ResumeSnapshot(snapshot)), None)
    before = await clock.measure(client)
    done = await _resume(client, ResumeSnapshot(snapshot, -before.offset_ns, os.urandom(SEED_BYTES)))
    after = await clock.measure(client)
    if abs(after.offset_ns) > 2 * (before.error_ns + after.error_ns):
        # An answer that was lost with a connection, and a step made twice.
        after = (await clock.sync(client)).after
    return Resumed(done, after)


@asynccontextmanager
async def held(
    client: Client, snapshot: str, *, hold: float = HOLD_SECONDS, wait: float = WAIT_SECONDS
) -> AsyncIterator[SnapshotHeld]:
    """The guest is held in the block, and goes on behind it, however that ends."""
    answer = await prepare(client, snapshot, hold=hold, wait=wait)
    try:
        yield answer
    finally:
        await resume(client, snapshot)


async def _resume(client: Client, asked: ResumeSnapshot) -> SnapshotResumed:
    answer: SnapshotResumed = await client.call("guest.snapshot_resume", asked)
    return answer
