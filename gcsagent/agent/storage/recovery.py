"""What becomes of the mounts an earlier agent left: done ones stay, half made ones are undone.

Nobody was told of a mount that had not been written down as mounted, so undoing it is right; its repeat
does it anew. An unmount goes on to its end, for it had been begun.
"""

from __future__ import annotations

import logging

from gcsagent.agent.journal import UNDONE, RequestMark
from gcsagent.agent.registry import Registry
from gcsagent.agent.storage.service import StorageService
from gcsagent.agent.storage.table import Entry
from protocol.errors import RpcError
from protocol.families.storage import MountStatus, Unmounted

_log = logging.getLogger("agent.storage")


async def recover(registry: Registry, storage: StorageService) -> None:
    """Loads the table; what takes longer goes on in the background, and holds off requests about it."""
    storage.table.load()
    for entry in storage.table:
        if entry.dropped is not None:
            _answer(registry, entry.dropped, Unmounted())
        if entry.status is MountStatus.MOUNTED:
            if entry.frozen_until_ns:
                storage.freezer.watch(entry)
        elif entry.status in (MountStatus.MOUNTING, MountStatus.UNMOUNTING):
            if entry.leaving is not None and registry.journal.find(entry.leaving.ident) is None:
                registry.journal.begin(entry.leaving)
            await entry.changing.acquire()  # nobody has it yet
            registry.spawn(_finish(registry, storage, entry))


async def _finish(registry: Registry, storage: StorageService, entry: Entry) -> None:
    mark = entry.leaving
    try:
        await storage.tools.settled(entry)
        if entry.status is MountStatus.MOUNTING:
            _log.info("a mount that was half made is undone", extra={"mount": entry.ident})
            await storage.take_back(entry)
            return
        _log.info("an unmount goes on", extra={"mount": entry.ident})
        result: object = Unmounted(tuple(entry.holders))
        try:
            await storage.mounter.undo(entry)
            storage.table.forget(entry)
        except (RpcError, OSError) as error:
            _log.error("a mount resists", extra={"mount": entry.ident, "error": str(error)})
            entry.status, entry.leaving, entry.leaves, result = MountStatus.MOUNTED, None, "", UNDONE
            storage.table.note(entry)
        if mark is not None:
            registry.journal.finish(mark, result)
    finally:
        entry.changing.release()


def _answer(registry: Registry, mark: RequestMark, result: object) -> None:
    if registry.journal.find(mark.ident) is None:
        registry.journal.finish(mark, result)
