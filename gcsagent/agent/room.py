"""Room for answers that may be large: what one connection makes the agent hold is bounded.

Answers are made while others wait to be taken by the host. A request whose answer may be large reserves room
for it before it begins, in order, and has it until the answer is written; for a host that does not read no
further one is made. What is answered without waiting needs none: it is written before the next request is
read (agent.wire).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from gcsagent.agent.registry import Registry
from gcsagent.agent.runc import MAX_OUTPUT
from gcsagent.agent.wire import MAX_UNREAD
from protocol.limits import MAX_FRAME

MAX_ROOM = 2 * MAX_FRAME
"""Bytes of answers, being made or unread, beyond which a large one is not begun."""


def wanted(registry: Registry, method: str, params: Any) -> int:
    """What the answer may come to, of a method that waits for something; 0 when it is a few lines."""
    if method == "container.processes":
        from gcsagent.agent.process_list import PAGE_BYTES

        return PAGE_BYTES
    if method == "agent.info":
        return MAX_OUTPUT if params.features else 0
    if method == "container.state" and params.container in registry.containers:
        from gcsagent.agent.container_list import size_of

        return size_of(registry.containers[params.container], True)
    return 0


class Room:
    def __init__(self, unread: Callable[[], int]) -> None:
        """``unread`` says how many bytes of answers the host has not taken."""
        self._unread = unread
        self._reserved = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def reserve(self, size: int) -> None:
        if not self._waiting and self._fits(size):
            self._reserved += size
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._waiting = deque(each for each in self._waiting if each[1] is not turn)
                self.look_again()
            else:  # it was there, and nobody went on from there
                self.release(size)
            raise

    def release(self, size: int) -> None:
        self._reserved -= size
        self.look_again()

    def look_again(self) -> None:
        """The host has taken what was unread, or something is no longer reserved."""
        while self._waiting and self._fits(self._waiting[0][0]):
            size, turn = self._waiting.popleft()
            if not turn.done():
                self._reserved += size
                turn.set_result(None)

    def _fits(self, size: int) -> bool:
        unread = self._unread()
        return unread <= MAX_UNREAD and (not self._reserved or self._reserved + unread + size <= MAX_ROOM)
