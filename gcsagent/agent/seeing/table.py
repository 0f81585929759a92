"""The methods that show how the agent is doing."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from gcsagent.agent.call import Call
from gcsagent.agent.info import AgentService
from gcsagent.agent.registry import Registry
from gcsagent.agent.seeing.metrics import MetricsService


def handlers(
    registry: Registry, agent: AgentService
) -> dict[str, Callable[[Any, Call], Any | Awaitable[Any]]]:
    metrics = MetricsService(registry, agent.generation, agent.supervisor_pid)
    return {"agent.metrics": metrics.metrics}
