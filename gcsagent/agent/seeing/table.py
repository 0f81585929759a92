"""The methods that show how the agent is doing."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from gcsagent.agent.call import Call
from gcsagent.agent.info import AgentService
from gcsagent.agent.registry import Registry
from gcsagent.agent.seeing.level import LevelService
from gcsagent.agent.seeing.logread import LogService
from gcsagent.agent.seeing.logring import LogRing
from gcsagent.agent.seeing.metrics import MetricsService
from gcsagent.agent.seeing.stacks import stacks


def handlers(
    registry: Registry, agent: AgentService, log: LogRing
) -> dict[str, Callable[[Any, Call], Any | Awaitable[Any]]]:
    metrics = MetricsService(registry, agent.generation, agent.supervisor_pid, agent.started)
    return {
        "agent.metrics": metrics.metrics,
        "agent.stacks": stacks,
        "agent.log_level": LevelService(registry.keeper.supervisor).log_level,
        "agent.logs": LogService(log).logs,
    }
