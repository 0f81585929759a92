"""agent.log_level: how much is logged, changed while the agent runs."""

from __future__ import annotations

import logging

from gcsagent.agent.call import Call
from gcsagent.agent.supervisor_client import SupervisorClient
from protocol.families.diagnostics import Level, LogLevel, SetLogLevel

_log = logging.getLogger("agent.log")


class LevelService:
    """The supervisor keeps it, for itself and for the next agent."""

    def __init__(self, supervisor: SupervisorClient) -> None:
        self._supervisor = supervisor

    async def log_level(self, params: SetLogLevel, call: Call) -> LogLevel:
        root = logging.getLogger()
        if params.level is not None:
            call.commit()
            await self._supervisor.call("log_level", {"level": params.level.value})
            root.setLevel(params.level.value.upper())
            _log.info("log level", extra={"to": params.level.value})
        return LogLevel(Level(logging.getLevelName(root.level).lower()))
