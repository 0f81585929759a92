"""One request on its way through the agent: its deadline, its commit point, its log."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from gcsagent.agent.journal import RequestMark
from gcsagent.agent.logs import ContextLogger
from protocol.errors import Code, RpcError

CLEANUP_SECONDS = 15.0
"""How long undoing a call may take beyond its deadline."""


class Call:
    """Until :meth:`commit`, :meth:`abort` cancels the handler, which undoes what it did; afterwards the
    result stands, however late it comes."""

    def __init__(
        self, method: str, deadline_ms: int | None, log: ContextLogger | Callable[[], ContextLogger]
    ) -> None:
        """``log`` may be what makes it: most calls have nothing to say."""
        self.method, self._log, self.started = method, log, time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._deadline = None if deadline_ms is None else self.started + deadline_ms / 1000
        self._timer: asyncio.TimerHandle | None = None
        self._committed = False
        self.reserved = 0
        """Bytes of room for its answer (agent.room)."""
        self.before: Callable[[], Awaitable[None]] | None = None
        """What is waited for first, within the deadline."""
        self.asked_by = 0
        """The connection it came on, as agent.turns knows it."""
        self.mark: RequestMark | None = None
        self.begun_before = False
        """An agent was killed over this very request (agent.journal)."""
        self.task: asyncio.Task[Any] | None = None
        self.aborted: RpcError | None = None
        self.afterwards: Callable[[], None] | None = None
        """What the session is to do once the answer has been written."""

    @property
    def log(self) -> ContextLogger:
        if not isinstance(self._log, ContextLogger):
            self._log = self._log()
        return self._log

    @property
    def timeout(self) -> float:
        """Seconds a runtime call may take: what is left, and a little, so that the deadline is seen first."""
        if self._deadline is None:
            return 24 * 3600.0
        return max(0.1, self._deadline - self._loop.time()) + 1.0

    def arm(self) -> None:
        if self._deadline is not None:
            error = RpcError(Code.DEADLINE_EXCEEDED, f"{self.method} did not end within its deadline")
            self._timer = self._loop.call_at(self._deadline, self.abort, error)

    def disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def commit(self) -> None:
        self._committed = True

    def abort(self, error: RpcError) -> None:
        if not self._committed and self.aborted is None and self.task is not None:
            self.aborted = error
            self.task.cancel()
