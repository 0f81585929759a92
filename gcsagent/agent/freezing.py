"""container.pause and resume: the status PAUSED, and that it is true of the cgroup.

A pause is written down before the runtime is asked for it and a resume afterwards, so that an agent that
was killed in between finds a container it may resume: resuming what is not frozen succeeds.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from gcsagent.agent.call import Call
from gcsagent.agent.container import Container
from gcsagent.agent.logs import context
from gcsagent.agent.registry import Registry
from gcsagent.agent.runtime import RuntimeFailure
from protocol.checks import INIT
from protocol.families.container import ContainerRef
from protocol.method import Empty
from protocol.types import Event, Status

_log = logging.getLogger("agent.freezing")

PAUSED, RESUMED = "container.paused", "container.resumed"


class FreezingService:
    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def pause(self, params: ContainerRef, call: Call) -> Empty:
        container = self._registry.get(params.container)
        async with container.freezing:
            container.check("pause")
            try:
                container.status, container.freeze_request = Status.PAUSED, call.mark
                container.save()
                await container.runtime.pause(container.ident, call.timeout)
            except BaseException:
                _undo_pause(container)
                raise
            if container.status is not Status.PAUSED:
                container.check("pause")  # init was killed meanwhile: what it is now is the answer
            call.commit()
            self._registry.events.publish(PAUSED, container.ident, INIT)
        return Empty()

    async def resume(self, params: ContainerRef, call: Call) -> Empty:
        container = self._registry.get(params.container)
        async with container.freezing:
            container.check("resume")
            try:
                await container.runtime.resume(container.ident, call.timeout)
            except RuntimeFailure:
                if container.cgroup.frozen():
                    raise
            call.commit()
            if container.status is Status.PAUSED:  # else it has ended as soon as it ran
                container.status, container.freeze_request = Status.RUNNING, call.mark
                self._registry.events.publish(RESUMED, container.ident, INIT)
                _save(container)
        return Empty()


def last_told(events: Iterable[Event]) -> dict[str, str]:
    """Which of the two events came last, by container."""
    return {event.container: event.type for event in events if event.type in (PAUSED, RESUMED)}


def after_restart(registry: Registry, container: Container, told: dict[str, str]) -> None:
    """Answers and tells what an agent had written down and may have been killed before it said so."""
    mark = container.freeze_request
    if mark is not None and registry.journal.find(mark.ident) is None:
        registry.journal.finish(mark, Empty())
    wanted = PAUSED if container.status is Status.PAUSED else RESUMED
    if wanted != told.get(container.ident, RESUMED):
        context(_log, container=container.ident).info(f"{wanted} had not been told")
        registry.events.publish(wanted, container.ident, INIT)


def _undo_pause(container: Container) -> None:
    container.cgroup.thaw()
    if container.status is Status.PAUSED:
        container.status, container.freeze_request = Status.RUNNING, None
        _save(container)


def _save(container: Container) -> None:
    """It runs, whether or not that can be written; what stays written is that it may be resumed."""
    try:
        container.save()
    except OSError as error:
        context(_log, container=container.ident).error(
            "a resume cannot be written down", extra={"error": str(error)}
        )
