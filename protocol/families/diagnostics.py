"""``agent.*`` that shows how the agent is doing: numbers, stacks, the log."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

from protocol import checks
from protocol.dataclass import dataclass, field
from protocol.limits import MAX_LOG_PAGE, MAX_METRICS_PAGE
from protocol.method import QUICK, Empty, Method


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


@dataclass(frozen=True, slots=True)
class Stacks:
    text: str
    """For people: each thread and task, and the calls it is in, outermost first."""
    truncated: bool = False
    """There was more than fits."""


class Level(StrEnum):
    """How important a line of the log is; a level means its own lines and those of the ones behind it."""

    DEBUG = "debug"
    """Every connection and refused request."""
    INFO = "info"
    """What happens to containers and processes."""
    WARNING = "warning"
    """What was not expected and has been dealt with."""
    ERROR = "error"
    """What went wrong."""


@dataclass(frozen=True, slots=True)
class SetLogLevel:
    level: Level | None = None
    """The new level; absent: only say which it is."""


@dataclass(frozen=True, slots=True)
class LogLevel:
    level: Level
    """What is logged now."""


class LogSource(StrEnum):
    """Whose log."""

    AGENT = "agent"
    """The agent's and the supervisor's."""
    KERNEL = "kernel"
    """The guest's kernel's, as /dev/kmsg has it."""


@dataclass(frozen=True, slots=True)
class AskLogs:
    after: checks.Offset = 0
    """Entries with a greater `seq`."""
    limit: Annotated[int, checks.Between(1, MAX_LOG_PAGE)] = 500
    """Entries at the most."""
    follow: bool = False
    """When there is none yet, answer as soon as there is one."""
    source: LogSource = LogSource.AGENT
    """Whose log."""


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One line of the log."""

    seq: int
    """Its number, one more for each; restarts of the agent do not interrupt it."""
    time_ns: int
    """When, by the guest's clock, since the epoch."""
    level: str
    """`debug`, `info`, `warning`, `error` or `critical`."""
    source: str
    """`agent`, `supervisor` or `kernel`."""
    name: str
    """Which part of it."""
    message: str
    """What happened; at most 4,096 characters."""
    fields: dict[str, Any] = field(default_factory=dict)
    """To whom, such as `container`; at most 32, each value a number, a bool, null or a short string."""
    generation: int = 0
    """Of the agent that wrote it or passed it on; 0: the kernel."""


@dataclass(frozen=True, slots=True)
class LogPage:
    entries: tuple[LogEntry, ...]
    """The oldest that were asked for."""
    last: int
    """Number of the newest there is; smaller than `after`: the numbering began anew."""
    dropped: int
    """How many behind `after` are no longer there."""


METHODS = (
    Method("agent.metrics", AskMetrics, Metrics, QUICK),
    Method("agent.stacks", Empty, Stacks, QUICK),
    Method("agent.log_level", SetLogLevel, LogLevel, QUICK, True, "the supervisor is being told"),
    Method("agent.logs", AskLogs, LogPage, None),
)
