"""guest.snapshot_prepare and snapshot_resume: the guest's part of a snapshot of its VM.

Prepared, nothing that was asked for is half done, what was written is on the disks, and their file systems
are frozen: a copy of memory and disks made now is one moment of one machine. That lasts until the guest is
told to go on, or as long as was agreed, whoever may have died meanwhile. Containers are not paused: what
stops the VM stops them.

A guest that goes on may be a copy, hours later. It takes the time and the random bytes it is given before
anything else begins. Connections need nothing: whatever the device, the agent listens on all of them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from gcsagent.agent.call import Call
from gcsagent.agent.calls import CannotStart
from gcsagent.agent.failures import not_started
from gcsagent.agent.guest import entropy
from gcsagent.agent.guest.clock import step
from gcsagent.agent.guest.hold import Hold, HoldFile
from gcsagent.agent.guest.only import refuse_outside
from gcsagent.agent.storage.freezer import THAW_SECONDS
from gcsagent.agent.storage.table import Entry, boot_time_ns
from gcsagent.agent.undoing import Held, bounded
from protocol.errors import Code, RpcError
from protocol.families.guest import SetTime
from protocol.families.snapshot import PrepareSnapshot, ResumeSnapshot, SnapshotHeld, SnapshotResumed
from protocol.families.storage import MountKind, MountStatus

if TYPE_CHECKING:
    from gcsagent.agent.registry import Registry

MARGIN_MS = 30_000
"""A file system thaws by itself so long after the guest should have gone on, and not before."""

HELD, RESUMED = "guest.held", "guest.resumed"

_log = logging.getLogger("agent.guest.snapshot")


class SnapshotService:
    def __init__(self, registry: Registry, state: str) -> None:
        self._registry, self._file = registry, HoldFile(state)
        self._hold: Hold | None = None
        self._owed: Hold | None = None
        """What an earlier agent ended on request, and may not have lived to say so."""
        self._changing = asyncio.Lock()
        self._timer: asyncio.TimerHandle | None = None

    # -- holding --------------------------------------------------------------------------------

    async def prepare(self, params: PrepareSnapshot, call: Call) -> SnapshotHeld:
        async with Held(self._changing) as held:
            self._check_is(params.snapshot)
            before, hold = self._hold, self._hold or Hold(params.snapshot, 0, ())
            self._owed = None
            self._registry.quiet.begin(params.snapshot)
            try:
                if before is None:
                    await self._settle(params.wait_ms / 1000)
                    await self._sync(call.timeout)
                    hold = Hold(params.snapshot, 0, tuple(entry.number for entry in self._freezable()))
                    self._file.write(hold)
                entries = self._entries(hold)
                for entry in entries:
                    async with entry.changing:
                        await self._registry.storage.get().freezer.freeze(
                            entry, params.hold_ms + MARGIN_MS, call.timeout
                        )
                until = boot_time_ns() + params.hold_ms * 1_000_000
                seq = hold.seq if before is not None else self._registry.events.last
                hold = Hold(params.snapshot, until, hold.mounts, seq)
                self._file.write(hold)
            except BaseException:
                if before is None:
                    await bounded(self._undo(hold), held)
                raise
            call.commit()
            self._keep(hold)
            if before is None:
                self._registry.events.publish(HELD, snapshot=hold.snapshot, hold_ms=params.hold_ms)
        _log.info("held for a snapshot", extra={"snapshot": hold.snapshot, "hold_ms": params.hold_ms})
        return SnapshotHeld(hold.snapshot, hold.left_ns // 1_000_000, tuple(entry.ident for entry in entries))

    def _check_is(self, snapshot: str) -> None:
        if self._hold is not None and self._hold.snapshot != snapshot:
            raise RpcError(
                Code.FAILED_PRECONDITION,
                f"the guest is held for snapshot {self._hold.snapshot}: resume that first",
                snapshot=self._hold.snapshot,
            )

    async def _settle(self, seconds: float) -> None:
        registry = self._registry
        deletions = [each.deletion for each in registry.containers.values() if each.deletion is not None]
        busy = await registry.quiet.settled(seconds, (*deletions, *registry.archives.under_way))
        if busy:
            raise RpcError(
                Code.FAILED_PRECONDITION,
                f"still under way after {seconds:g} s: {', '.join(busy[:8])}; try again",
                under_way=busy[:8],
            )

    async def _sync(self, seconds: float) -> None:
        try:
            outcome = await self._registry.caller.run(["sync"], seconds)
        except CannotStart as error:
            raise not_started(error, f"cannot write the disks: {error}") from error
        if outcome.timed_out or outcome.status:
            raise RpcError(
                Code.DEADLINE_EXCEEDED if outcome.timed_out else Code.INTERNAL,
                f"sync did not end within {seconds:.0f} s" if outcome.timed_out else outcome.stderr,
            )

    def _freezable(self) -> Iterable[Entry]:
        """File systems on disks, each once, the newest first; what its user has frozen is the user's."""
        devices = set()
        for entry in reversed(list(self._registry.storage.get().table)):
            on_disk = entry.asked.kind is MountKind.BLOCK and not entry.read_only
            if on_disk and entry.status is MountStatus.MOUNTED and not entry.frozen_until_ns:
                if entry.device not in devices:
                    yield entry
                devices.add(entry.device)

    def _entries(self, hold: Hold) -> list[Entry]:
        table = {entry.number: entry for entry in self._registry.storage.get().table}
        return [table[number] for number in hold.mounts if number in table]

    # -- going on -------------------------------------------------------------------------------

    async def resume(self, params: ResumeSnapshot, call: Call) -> SnapshotResumed:
        async with self._changing:
            self._check_is(params.snapshot)
            if params.offset_ns is not None or params.seed is not None:
                refuse_outside(self._registry.guest, "set the clock or feed the random number generator")
            if params.seed is not None:
                entropy.add(params.seed, 8 * len(params.seed))
                entropy.reseed()
            stepped = _step(params.offset_ns)
            call.commit()
            owed = self._owed if self._owed is not None and self._owed.snapshot == params.snapshot else None
            hold = self._hold or owed
            thawed = () if hold is None else tuple(entry.ident for entry in self._entries(hold))
            await self._release(expired=False)
            done = SnapshotResumed(
                params.snapshot, hold is not None, thawed, stepped, params.seed is not None
            )
            self._registry.journal.record(call.mark, done)
            self._owed = None
            self._file.remove()
        return done

    async def end(self) -> None:
        """The guest is going down: nothing may be held any more."""
        async with self._changing:
            await self._release(expired=False)
            self._file.remove()

    def _keep(self, hold: Hold) -> None:
        """Sees to it that it ends in time."""
        self._hold = hold
        self._cancel()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(hold.left_ns / 1e9, lambda: self._registry.spawn(self._expire()))

    async def _expire(self) -> None:
        async with self._changing:
            if self._hold is None:
                return
            if self._hold.left_ns:
                self._keep(self._hold)  # it was prolonged
                return
            _log.warning("nobody has resumed it: it goes on", extra={"snapshot": self._hold.snapshot})
            await self._release(expired=True)
            self._file.remove()

    async def _release(self, expired: bool) -> None:
        hold = self._hold
        if hold is None:
            return
        self._cancel()
        await self._thaw(hold)
        self._hold = None
        self._registry.quiet.end()
        self._registry.events.publish(RESUMED, snapshot=hold.snapshot, expired=expired)

    async def _undo(self, hold: Hold) -> None:
        await self._thaw(hold)
        self._registry.quiet.end()
        self._file.remove()

    async def _thaw(self, hold: Hold) -> None:
        for entry in reversed(self._entries(hold)):
            async with entry.changing:
                if entry.frozen_until_ns:
                    await self._registry.storage.get().freezer.thaw(entry, THAW_SECONDS, sure=False)

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # -- an agent that takes over ---------------------------------------------------------------

    def recover(self) -> None:
        """Goes on with what an earlier agent held; undoes what it had not finished. After the mounts."""
        hold = self._file.read()
        if hold is None:
            return
        self._registry.quiet.begin(hold.snapshot)
        if not hold.until_ns:
            self._registry.spawn(self._undo_late(hold))
            return
        told = {event.type: event for event in self._registry.events.all() if event.seq > hold.seq}
        if RESUMED in told:  # all was thawed
            self._registry.quiet.end()
            if told[RESUMED].data["expired"]:
                self._file.remove()
            else:
                self._owed = hold
            return
        if HELD not in told:
            self._registry.events.publish(HELD, snapshot=hold.snapshot, hold_ms=hold.left_ns // 1_000_000)
        self._keep(hold)

    async def _undo_late(self, hold: Hold) -> None:
        _log.info("a snapshot's preparation is undone", extra={"snapshot": hold.snapshot})
        async with self._changing:
            for entry in self._entries(hold):
                await self._registry.storage.get().tools.settled(entry)
            await self._undo(hold)


def _step(offset_ns: int | None) -> int:
    if offset_ns is None:
        return 0
    before, started = step(SetTime(offset_ns=offset_ns)), time.monotonic_ns()
    return time.time_ns() - before - (time.monotonic_ns() - started)
