"""Freezes file systems, for a bounded time: who asked may be gone when the time comes to thaw.

How long is written down with the mount, so that an agent which comes after thaws in time, too.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from gcsagent.agent.storage.table import Entry, Table, boot_time_ns
from gcsagent.agent.storage.tools import Tools
from protocol.errors import Code, RpcError
from protocol.families.storage import MountStatus

THAW_SECONDS = 30.0

AGAIN_SECONDS = 5.0
"""After which thawing is tried again that could not be carried out: who writes there waits for it."""

_log = logging.getLogger("agent.storage")

Spawn = Callable[[Coroutine[Any, Any, None]], object]


class Freezer:
    def __init__(self, table: Table, tools: Tools, spawn: Spawn) -> None:
        self._table, self._tools, self._spawn = table, tools, spawn
        self._timers: dict[int, asyncio.TimerHandle] = {}

    async def freeze(self, entry: Entry, for_ms: int, seconds: float) -> None:
        """Raises RpcError. Frozen again, it stays so for as long as was asked last."""
        before = entry.frozen_until_ns
        entry.frozen_until_ns = boot_time_ns() + for_ms * 1_000_000
        try:
            self._table.save(entry)
        except OSError:
            entry.frozen_until_ns = before
            raise
        self.watch(entry)
        if before:
            return
        try:
            argv = ["fsfreeze", "--freeze", entry.target]
            await self._tools.run(entry, argv, seconds, what=f"freeze {entry.target}")
        except BaseException as error:
            if isinstance(error, RpcError) and _said_so(error):
                self._forget(entry)  # it says so itself: what may be frozen, somebody else has frozen
            else:
                await asyncio.shield(self.thaw(entry, THAW_SECONDS, sure=False))
            if isinstance(error, RpcError) and error.code is Code.INTERNAL:
                raise RpcError(
                    Code.FAILED_PRECONDITION,
                    f"{error.message}; {entry.fstype} may not be able to",
                    **error.details,
                ) from error
            raise

    async def thaw(self, entry: Entry, seconds: float, *, sure: bool = True) -> None:
        """Raises RpcError. Without ``sure`` it may be thawed already, and none: what nobody could even try is
        tried again."""
        try:
            await self._tools.run(
                entry, ["fsfreeze", "--unfreeze", entry.target], seconds, what=f"thaw {entry.target}"
            )
        except RpcError as error:
            if sure:
                raise
            if not _said_so(error):
                _log.error("a file system stays frozen", extra={"mount": entry.ident, "error": str(error)})
                entry.frozen_until_ns = boot_time_ns()
                self._table.note(entry)
                self._arm(entry, AGAIN_SECONDS)
                return
        self._forget(entry)

    def _forget(self, entry: Entry) -> None:
        self._cancel(entry)
        entry.frozen_until_ns = 0
        self._table.note(entry)

    def watch(self, entry: Entry) -> None:
        """Sees to it that it thaws when its time has come, by whichever agent."""
        self._arm(entry, max(0, entry.frozen_until_ns - boot_time_ns()) / 1e9)

    def _arm(self, entry: Entry, seconds: float) -> None:
        self._cancel(entry)
        loop = asyncio.get_running_loop()
        self._timers[entry.number] = loop.call_later(seconds, lambda: self._spawn(self._expire(entry)))

    async def _expire(self, entry: Entry) -> None:
        async with entry.changing:
            if not entry.frozen_until_ns or entry.status is not MountStatus.MOUNTED:
                return
            if entry.frozen_until_ns > boot_time_ns():
                self.watch(entry)  # it was frozen anew meanwhile
                return
            _log.warning("a file system thaws that nobody has thawed", extra={"mount": entry.ident})
            await self.thaw(entry, THAW_SECONDS, sure=False)

    def _cancel(self, entry: Entry) -> None:
        timer = self._timers.pop(entry.number, None)
        if timer is not None:
            timer.cancel()


def _said_so(error: RpcError) -> bool:
    """The program ran to its end and refused; else nobody knows whether it did what it was there for."""
    return int(error.details.get("exit_status", -1)) > 0
