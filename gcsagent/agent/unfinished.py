"""A pause, resume or update that an earlier agent was killed over: waited for, then done or undone."""

from __future__ import annotations

import logging

from gcsagent.agent import changes, freezing, limits
from gcsagent.agent.container import Container
from gcsagent.agent.journal import UNDONE
from gcsagent.agent.logs import context
from gcsagent.agent.registry import Registry
from gcsagent.agent.runtime import change_call
from protocol.method import Empty
from protocol.types import Status

_log = logging.getLogger("agent.unfinished")


async def finish_change(registry: Registry, container: Container, told: dict[str, str]) -> None:
    """Nothing else is done to the container before the runtime's call has ended. ``told`` is
    :func:`gcsagent.agent.freezing.last_told` of the events there were."""
    change = container.change
    async with container.changing:
        outcome = await registry.caller.join(change_call(container.ident))
        done = False
        if change is not None:
            settle = limits.settle if change.kind == limits.UPDATE else freezing.settle
            done = settle(container, change, outcome)
            context(_log, container=container.ident).info(
                f"{change.kind} had {'' if done else 'not '}succeeded"
            )
        changes.end(registry, container)
        if container.status in (Status.RUNNING, Status.PAUSED):
            freezing.after_restart(registry, container, told)
    if change is not None and change.request is not None:
        registry.journal.finish(change.request, Empty() if done else UNDONE)
