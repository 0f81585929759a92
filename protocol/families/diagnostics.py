"""``agent.*`` that shows how the agent is doing: numbers, stacks, the log."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from protocol import checks
from protocol.limits import MAX_METRICS_PAGE
from protocol.method import QUICK, Method


@dataclass(frozen=True, slots=True)
class AskMetrics:
    after: checks.Id | None = None
    """Only containers whose ids sort behind this one; absent: from the first on, and all that is of no
    container."""
    limit: Annotated[int, checks.Between(1, MAX_METRICS_PAGE)] = 64
    """Containers at the most."""


@dataclass(frozen=True, slots=True)
class Metrics:
    text: str
    """Prometheus' text exposition format, version 0.0.4."""
    next: str | None = None
    """What to ask for the next page with, as ``after``; absent: this was the last."""


METHODS = (Method("agent.metrics", AskMetrics, Metrics, QUICK),)
