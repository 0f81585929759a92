"""storage.mount, unmount, list, trim, freeze and thaw.

Mounts have holders: the ids under which the same thing was asked for. Whatever is mounted stays until the
last of them is gone, and until nothing is built on it any more.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gcsagent.agent import mountinfo
from gcsagent.agent.call import Call
from gcsagent.agent.storage import users, wanted
from gcsagent.agent.storage.freezer import THAW_SECONDS, Freezer
from gcsagent.agent.storage.mounter import UNDO_SECONDS, Mounter
from gcsagent.agent.storage.table import Entry, Table, same
from gcsagent.agent.storage.tools import Tools
from gcsagent.agent.undoing import Held, bounded
from protocol.errors import Code, RpcError
from protocol.families.storage import (
    FreezeStorage,
    ListMounts,
    MountKind,
    MountList,
    MountRef,
    MountState,
    MountStatus,
    MountStorage,
    Trimmed,
    Unmounted,
    UnmountStorage,
)
from protocol.limits import MAX_FRAME
from protocol.method import Empty

if TYPE_CHECKING:
    from gcsagent.agent.registry import Registry

_log = logging.getLogger("agent.storage")

_ROOM, _STATE = MAX_FRAME * 3 // 4, 512
"""Bytes of mounts in one answer, and of one's short fields."""

_TRIMMED = re.compile(r"([0-9]+) bytes|\(([0-9]+) bytes\)")


class StorageService:
    def __init__(self, registry: Registry, state: str, mounts: str) -> None:
        """``mounts`` is where mounts go that name no target."""
        self._registry, self._state, self._mounts = registry, state, mounts
        self.table = Table(state)
        self.tools = Tools(registry.caller)
        self.mounter = Mounter(self.table, self.tools)
        self.freezer = Freezer(self.table, self.tools, registry.spawn)

    def handlers(self) -> dict[str, Callable[[Any, Call], Any]]:
        return {
            "storage.mount": self.mount,
            "storage.unmount": self.unmount,
            "storage.list": self.page,
            "storage.trim": self.trim,
            "storage.freeze": self.freeze,
            "storage.thaw": self.thaw,
        }

    # -- mounting -------------------------------------------------------------------------------

    async def mount(self, params: MountStorage, call: Call) -> MountState:
        asked = wanted.settle(params, self._mounts, self._state)
        while (there := self.table.held_as(asked.mount) or self.table.in_the_place_of(asked)) is not None:
            _check_same(there, asked)
            if there.status is MountStatus.MOUNTED:
                return self._hold(there, asked.mount, call)
            if there.status is MountStatus.FAILED:
                raise _failed(there)
            async with there.changing:
                pass  # whoever is at it has ended: look again
        self._check_hides_nothing(asked)
        entry = self.table.begin(asked)
        async with Held(entry.changing) as held:  # at once: nobody has it yet
            try:
                await self.mounter.make(entry, call.timeout)
                entry.status = MountStatus.MOUNTED
                self.table.save(entry)
            except BaseException:
                entry.status = MountStatus.MOUNTING
                await bounded(self.take_back(entry), held)
                raise
            call.commit()
        return entry.state(asked.mount)

    def _hold(self, entry: Entry, ident: str, call: Call) -> MountState:
        if ident not in entry.holders:
            entry.holders.append(ident)
            try:
                self.table.save(entry)
            except OSError:
                entry.holders.remove(ident)
                raise
        call.commit()
        return entry.state(ident)

    def _check_hides_nothing(self, asked: MountStorage) -> None:
        for other in self.table:
            if asked.target and other.target and mountinfo.below(other.target, asked.target):
                raise RpcError(
                    Code.FAILED_PRECONDITION,
                    f"target: mount {other.ident} is at {other.target}, which would be hidden; unmount"
                    " it first",
                    field="target",
                    mount=other.ident,
                )

    async def take_back(self, entry: Entry) -> None:
        """Undoes it whole; what resists leaves it FAILED, for storage.unmount to try again."""
        try:
            await self.mounter.undo(entry)
        except (RpcError, OSError) as error:
            entry.status, entry.problem = MountStatus.FAILED, str(error)
            self.table.note(entry)
            _log.error("a mount resists", extra={"mount": entry.ident, "error": str(error)})
            return
        self.table.forget(entry)

    # -- unmounting -----------------------------------------------------------------------------

    async def unmount(self, params: UnmountStorage, call: Call) -> Unmounted:
        entry = self.table.get(params.mount)
        async with entry.changing:
            if entry is not self.table.held_as(params.mount):
                return await self.unmount(params, call)
            if len(entry.holders) > 1:
                return self._drop(entry, params.mount, call)
        gone: list[str] = []
        for other in users.built_on(self.table, entry):
            if not params.dependents:
                raise _in_use(entry, f"mount {other.ident} is built on it", mounts=[other.ident])
            gone += await self._leave(other, call, None)
        gone += await self._leave(entry, call, params.mount)
        return Unmounted(tuple(gone))

    def _drop(self, entry: Entry, ident: str, call: Call) -> Unmounted:
        kept, entry.holders, entry.dropped = (
            entry.holders,
            [each for each in entry.holders if each != ident],
            call.mark,
        )
        try:
            self.table.save(entry)
        except OSError:
            entry.holders = kept
            raise
        call.commit()
        return Unmounted()

    async def _leave(self, entry: Entry, call: Call, ident: str | None) -> list[str]:
        """For its holder ``ident``, or whoever holds it; returns the ids that are mounted no more."""
        async with entry.changing:
            if not any(each is entry for each in self.table) or self._others_keep(entry, ident, call):
                return []
            await self._check_unused(entry)
            if self._others_keep(entry, ident, call):  # since that was looked at somebody has joined
                return []
            holders = list(entry.holders)
            call.commit()
            await self.leave(entry, call if ident is not None else None)
            return holders

    def _others_keep(self, entry: Entry, ident: str | None, call: Call) -> bool:
        """Whether it stays for others, ``ident`` being none of its holders any more."""
        if ident is None:
            return False
        if ident in entry.holders and len(entry.holders) > 1:
            self._drop(entry, ident, call)
        return ident not in entry.holders

    async def _check_unused(self, entry: Entry) -> None:
        built = users.built_on(self.table, entry)
        if built:
            raise _in_use(entry, f"mount {built[0].ident} is built on it", mounts=[built[0].ident])
        if not entry.target or entry.status is not MountStatus.MOUNTED:
            return
        containers = await users.containers(self._registry.containers.values(), entry.target)
        if containers:
            names = ", ".join(containers[:8])
            raise _in_use(entry, f"container {names} uses it", containers=containers[:64])
        strangers = users.foreign(self.table, entry)
        if strangers:
            raise _in_use(
                entry, f"somebody else has mounted something on {strangers[-1]}", paths=strangers[:64]
            )

    async def leave(self, entry: Entry, call: Call | None, seconds: float = UNDO_SECONDS) -> None:
        """Unmounts it, whoever holds it. Raises RpcError; it is MOUNTED then, or FAILED if it was."""
        before = entry.status
        entry.leaves = self.mounter.place(entry)
        entry.status, entry.leaving = MountStatus.UNMOUNTING, call.mark if call is not None else None
        self.table.note(entry)
        try:
            if entry.frozen_until_ns:
                await self.freezer.thaw(entry, THAW_SECONDS, sure=False)
            await self.mounter.undo(entry, seconds)
        except (RpcError, OSError) as error:
            entry.status, entry.leaving, entry.leaves = before, None, ""
            self.table.note(entry)
            if "busy" in str(error).lower():
                raise _in_use(entry, f"a process in the guest has files open on it ({error})") from error
            raise
        if call is not None:
            self._registry.journal.record(call.mark, Unmounted(tuple(entry.holders)))
        self.table.forget(entry)

    async def unmount_all(self) -> None:
        """The newest first, as far as it goes: the guest, or the agent's service in it, is going down."""
        for entry in reversed(list(self.table)):
            async with entry.changing:
                try:
                    await self.leave(entry, None)
                except (RpcError, OSError) as error:
                    _log.error("a mount resists", extra={"mount": entry.ident, "error": str(error)})

    # -- looking, and the rest ------------------------------------------------------------------

    def page(self, params: ListMounts, _call: Call) -> MountList:
        after = self.table.get(params.after) if params.after else None
        left = [entry for entry in self.table if after is None or entry.number > after.number]
        page: list[MountState] = []
        room = _ROOM
        for entry in left[: params.limit]:
            room -= _STATE + len(entry.target) * 4 + len(entry.source) * 4 + 4 * len(entry.problem)
            room -= sum(map(len, entry.holders))
            if room < 0 and page:
                break
            page.append(entry.state())
        return MountList(tuple(page), len(left) - len(page))

    async def trim(self, params: MountRef, call: Call) -> Trimmed:
        entry = self._mounted(params.mount)
        async with entry.changing:
            self._check_still_there(entry)
            try:
                said = await self.tools.output(
                    entry, ["fstrim", "-v", entry.target], call.timeout, f"trim {entry.target}"
                )
            except RpcError as error:
                if "not supported" in error.message:
                    raise RpcError(
                        Code.FAILED_PRECONDITION,
                        f"{error.message}; its device has no discard",
                        **error.details,
                    ) from error
                raise
            call.commit()
        found = _TRIMMED.search(said)
        return Trimmed(int(found[1] or found[2]) if found else 0)

    async def freeze(self, params: FreezeStorage, call: Call) -> Empty:
        entry = self._mounted(params.mount)
        async with entry.changing:
            self._check_still_there(entry)
            await self.freezer.freeze(entry, params.for_ms, call.timeout)
            call.commit()
        return Empty()

    async def thaw(self, params: MountRef, call: Call) -> Empty:
        """Thawing what is not frozen is no error: it may have thawed by itself."""
        entry = self._mounted(params.mount)
        async with entry.changing:
            if entry.frozen_until_ns:
                await self.freezer.thaw(entry, call.timeout)
            call.commit()
        return Empty()

    def _mounted(self, ident: str) -> Entry:
        entry = self.table.get(ident)
        if entry.asked.kind is MountKind.SWAP:
            raise RpcError(Code.FAILED_PRECONDITION, f"mount {ident} is swap space, not a file system")
        return entry

    def _check_still_there(self, entry: Entry) -> None:
        if entry.status is not MountStatus.MOUNTED:
            raise RpcError(Code.FAILED_PRECONDITION, f"mount {entry.ident} is {entry.status.value}")


def mounts_directory(state: str, guest: bool) -> str:
    """In a guest it is short and beside the state, for layers' paths have to share one page."""
    return os.path.join(os.path.dirname(state) if guest else state, "mounts")


def _check_same(there: Entry, asked: MountStorage) -> None:
    if not same(there.asked, asked):
        what = f"mount {there.ident} is something else"
        where = f", at {there.target}" if there.target else ""
        raise RpcError(
            Code.ALREADY_EXISTS,
            f"{what}{where}: unmount it, or take another id and target",
            mount=there.ident,
        )


def _failed(entry: Entry) -> RpcError:
    return RpcError(
        Code.FAILED_PRECONDITION,
        f"mount {entry.ident} has failed and could not be undone: {entry.problem}; unmount it first",
        mount=entry.ident,
    )


def _in_use(entry: Entry, why: str, **details: object) -> RpcError:
    return RpcError(Code.FAILED_PRECONDITION, f"cannot unmount {entry.ident}: {why}", **details)
