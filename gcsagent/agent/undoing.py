"""Undoing a request that failed: to its end, though its caller is not kept waiting for that for ever."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Coroutine
from typing import Any

from gcsagent.agent.call import CLEANUP_SECONDS
from gcsagent.agent.turns import ASKED_BY

_log = logging.getLogger("agent.undoing")


class Held:
    """A lock around a block. It is let go when the block has ended, and what undoes it (:func:`bounded`)."""

    def __init__(self, lock: asyncio.Lock) -> None:
        self._lock = lock
        self.undoing: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Held:
        await self._lock.acquire()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.undoing is None or self.undoing.done():
            self._lock.release()
        else:  # nobody else is to begin while it is at work
            self.undoing.add_done_callback(lambda _: self._lock.release())


async def bounded(cleanup: Coroutine[Any, Any, None], held: Held | None = None) -> None:
    """Runs an undo to its end even if its caller is cancelled again, but does not wait for ever.

    It is the agent's own work, and waits for no turn.
    """
    context = contextvars.copy_context()
    context.run(ASKED_BY.set, 0)
    task = asyncio.get_running_loop().create_task(cleanup, context=context)
    task.add_done_callback(_log_failure)
    if held is not None:
        held.undoing = task
    try:
        await asyncio.wait([task], timeout=CLEANUP_SECONDS)
    except asyncio.CancelledError:
        await asyncio.wait([task], timeout=CLEANUP_SECONDS)
        raise


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        _log.error("undoing a request failed", exc_info=task.exception())
