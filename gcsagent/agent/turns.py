"""Whose runtime call is next: a crowd of one connection's must not keep the others waiting.

A connection has so many calls under way at a time, and all of them together so many; what is beyond waits in
the queue of its connection, and the connections are served in turn. Nothing waits for a call that it may be
there to end: what controls containers (pause, resume, update, delete, state) has a lane of its own beside
what launches, and what the agent does by itself, such as cleaning up, waits for nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator
from contextvars import ContextVar

from protocol.limits import Limits

ASKED_BY: ContextVar[int] = ContextVar("asked_by", default=0)
"""The connection whose request the current task works on; 0 is the agent itself."""

LAUNCHES = frozenset({"create", "start", "exec", "checkpoint", "restore"})
"""Actions that may take long, and of which there may be many."""


class NotBegun(asyncio.CancelledError):
    """The request was given up while it waited for its turn: nothing had been started."""


class Turns:
    def __init__(self, limits: Limits) -> None:
        self._launches, self._controls = _Lane(limits), _Lane(limits)

    @contextlib.asynccontextmanager
    async def turn(self, action: str) -> AsyncIterator[None]:
        """The block is one call of the runtime. Raises NotBegun when cancelled before its turn has come."""
        asked_by = ASKED_BY.get()
        if not asked_by:
            yield
            return
        lane = self._launches if action in LAUNCHES else self._controls
        await lane.enter(asked_by)
        try:
            yield
        finally:
            lane.leave(asked_by)


class _Lane:
    """Counts what is under way, by connection. ``_waiting`` is in the order in which they are served."""

    def __init__(self, limits: Limits) -> None:
        self._each, self._all = limits.max_runtime_calls, limits.max_runtime_calls_total
        self._running: dict[int, int] = {}
        self._total = 0
        self._waiting: dict[int, deque[asyncio.Future[None]]] = {}

    async def enter(self, who: int) -> None:
        if who not in self._waiting and self._has_room(who):
            self._begin(who)
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(who, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError as error:
            if turn.cancelled():
                self._forget(who, turn)
            else:  # it had come, and nobody went on from there
                self.leave(who)
            raise NotBegun from error

    def leave(self, who: int) -> None:
        self._total -= 1
        self._running[who] -= 1
        if not self._running[who]:
            del self._running[who]
        self._admit()

    def _has_room(self, who: int) -> bool:
        return self._total < self._all and self._running.get(who, 0) < self._each

    def _begin(self, who: int) -> None:
        self._total += 1
        self._running[who] = self._running.get(who, 0) + 1

    def _forget(self, who: int, turn: asyncio.Future[None]) -> None:
        queue = self._waiting.get(who)
        if queue is not None and turn in queue:
            queue.remove(turn)
            if not queue:
                del self._waiting[who]

    def _admit(self) -> None:
        """Whoever is served goes to the end of the row."""
        while (who := next(filter(self._has_room, self._waiting), None)) is not None:
            queue = self._waiting.pop(who)
            turn = queue.popleft()
            if queue:
                self._waiting[who] = queue
            if not turn.done():  # else it was cancelled in this turn of the loop, and is on its way out
                self._begin(who)
                turn.set_result(None)
