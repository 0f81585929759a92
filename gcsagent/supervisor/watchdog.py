"""Ends an agent that is stuck: one that has not said ``alive`` for too long, or never became ready.

What follows is meant to leave a reason behind: SIGABRT, on which the agent's faulthandler writes every
thread's stack to standard error, and SIGCONT, without which a stopped process would not see it; SIGKILL
when that has not ended it either. The next agent goes on where it was.

Until READY more time is given, since an agent that starts imports and reloads: START_FACTOR times the
deadline for its first word, READY_FACTOR times for all of it.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

from gcsagent.common.loop import Loop, Timer
from gcsagent.supervisor.log import log

START_FACTOR, READY_FACTOR = 4, 20

DUMP_SECONDS = 5.0
"""What an agent may take to write its stacks and end."""

LATE_SECONDS = 1.0
"""A supervisor that comes this much too late itself has been held up with the whole machine (a paused VM, a
starved host): that says nothing about the agent, which gets its time again."""


class Watchdog:
    """``send`` sends a signal to the agent that runs now. With ``seconds`` 0 only :meth:`abort` acts."""

    def __init__(self, loop: Loop, seconds: float, send: Callable[[signal.Signals], None]) -> None:
        self._loop, self._seconds, self._send = loop, seconds, send
        self._heard = self._deadline = self._due = 0.0
        self._silence: Timer | None = None
        self._start: Timer | None = None
        self._kill: Timer | None = None

    def started(self) -> None:
        if self._seconds:
            self._heard = time.monotonic()
            self._listen_until(self._heard + self._seconds * START_FACTOR)
            limit = self._seconds * READY_FACTOR
            self._start = self._loop.after(
                limit, lambda: self.abort(f"it did not become ready in {limit:g} s")
            )

    def alive(self) -> None:
        """A word of the agent's. Any number of them arms no further timer: only a nearer deadline does."""
        if self._silence is not None:
            self._heard = time.monotonic()
            self._deadline = self._heard + self._seconds
            if self._deadline < self._due:
                self._listen_until(self._deadline)

    def ready(self) -> None:
        if self._start is not None:
            self._start.cancel()

    def ended(self) -> None:
        for timer in (self._silence, self._start, self._kill):
            if timer is not None:
                timer.cancel()
        self._silence = self._start = self._kill = None

    def abort(self, reason: str) -> None:
        """Has the agent write its stacks and die, whatever state it is in."""
        self.ended()
        log("error", "the agent is aborted", reason=reason)
        self._send(signal.SIGABRT)
        self._send(signal.SIGCONT)
        self._kill = self._loop.after(DUMP_SECONDS, lambda: self._send(signal.SIGKILL))

    def _listen_until(self, deadline: float) -> None:
        if self._silence is not None:
            self._silence.cancel()
        self._deadline = self._due = deadline
        self._silence = self._loop.after(deadline - time.monotonic(), self._listened)

    def _listened(self) -> None:
        now = time.monotonic()
        if now < self._deadline:
            self._listen_until(self._deadline)
        elif now - self._due > LATE_SECONDS:
            log("warning", "the whole machine stood still; the agent gets its time again")
            self._listen_until(now + self._seconds)
        else:
            self.abort(f"no sign of life for {now - self._heard:.1f} s")
