"""How long a stream has been held up."""

from __future__ import annotations

import time


class Stopwatch:
    """Adds up the times between :meth:`start` and :meth:`stop`; each may be called again without harm."""

    __slots__ = ("_since", "_total")

    def __init__(self) -> None:
        self._total, self._since = 0.0, 0.0

    def start(self) -> None:
        if not self._since:
            self._since = time.monotonic()

    def stop(self) -> None:
        if self._since:
            self._total, self._since = self.seconds, 0.0

    @property
    def seconds(self) -> float:
        """Up to now."""
        return self._total + (time.monotonic() - self._since if self._since else 0.0)
