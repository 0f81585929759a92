"""How long an agent's successor is put off: not at all, unless agents keep failing by themselves.

One that ends before READY has failed; each in a row makes the next try wait twice as long. One that ends
within SHORT_SECONDS of READY may have been met by bad luck: the first FORGIVEN of them in a row are answered
at once, since hosts and streams wait for the successor. Who was killed from outside has not failed at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable

FIRST_DELAY, LONGEST_DELAY = 0.1, 2.0
SHORT_SECONDS, FORGIVEN = 5.0, 3
_DOUBLINGS = 10
"""Enough to pass any longest delay; a thousand would pass what a float holds."""


class BackOff:
    """``failures``: deaths in a row before READY; ``short_lives``: in a row soon behind it."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._ready_at: float | None = None
        self.failures = self.short_lives = 0

    def started(self) -> None:
        self._ready_at = None

    def ready(self) -> None:
        self._ready_at = self._now()
        self.failures = 0

    def ended(self, *, from_outside: bool) -> float:
        """Seconds to wait before the next one is started."""
        if self._ready_at is None:
            self.failures += 1
            return _delay(self.failures)
        if self._now() - self._ready_at >= SHORT_SECONDS:
            self.short_lives = 0
        elif not from_outside:
            self.short_lives += 1
            return _delay(self.short_lives - FORGIVEN)
        return 0.0


def delay_after(failures: int, longest: float) -> float:
    """Seconds, after so many in a row."""
    return min(FIRST_DELAY * 2 ** min(failures - 1, _DOUBLINGS), longest) if failures > 0 else 0.0


def _delay(failures: int) -> float:
    return delay_after(failures, LONGEST_DELAY)
