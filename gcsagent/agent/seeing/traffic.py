"""Requests counted as they are answered: by method and code, and how long each method took.

What is counted by is the contract's own methods and codes, so that no client can make the tables grow.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from typing import Any

from protocol.errors import RpcError
from protocol.methods import METHODS

BUCKETS = (0.001, 0.005, 0.025, 0.1, 0.5, 2.5, 10.0, 60.0)
"""Upper bounds in seconds: a lookup takes 0.2 ms, a runtime call 20 ms, under TCG 2 s."""

OK, UNKNOWN = "OK", "unknown"


class Latency:
    """A histogram. ``counts`` has one for each bucket, not added up, and one for what took longer."""

    __slots__ = ("counts", "seconds")

    def __init__(self) -> None:
        self.counts, self.seconds = [0] * (len(BUCKETS) + 1), 0.0


class Traffic:
    def __init__(self) -> None:
        self.answers: dict[str, dict[str, int]] = {}
        """How often each method was answered with each code; UNKNOWN for methods there are not."""
        self.latencies: dict[str, Latency] = {}

    def count(self, method: str, result: Any = None, times: int = 1) -> None:
        """Requests were answered, with ``result`` or with the error that it is."""
        codes = self.answers.setdefault(method if method in METHODS else UNKNOWN, {})
        code = result.code.value if isinstance(result, RpcError) else OK
        codes[code] = codes.get(code, 0) + times

    def took(self, method: str, since: float, times: int = 1) -> None:
        """Requests that began at ``since`` (time.monotonic) have been answered."""
        latency = self.latencies.get(method)
        if latency is None:
            latency = self.latencies[method] = Latency()
        seconds = time.monotonic() - since
        latency.counts[bisect_left(BUCKETS, seconds)] += times
        latency.seconds += seconds * times
