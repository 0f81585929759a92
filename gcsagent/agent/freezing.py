"""container.pause and resume: the status PAUSED, and that it is true of the cgroup.

What is about to be asked of the runtime is written down first (:mod:`gcsagent.agent.changes`). An agent
that was killed in between leaves a runtime call that goes on; the next one waits for that call's end, and
then looks: a container is paused when its cgroup is frozen.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from gcsagent.agent import changes
from gcsagent.agent.call import Call
from gcsagent.agent.calls import Outcome
from gcsagent.agent.changes import Change
from gcsagent.agent.container import Container
from gcsagent.agent.logs import context
from gcsagent.agent.registry import Registry
from gcsagent.agent.runtime import RuntimeFailure
from protocol.checks import INIT
from protocol.families.container import ContainerRef
from protocol.method import Empty
from protocol.types import Event, Status

_log = logging.getLogger("agent.freezing")

PAUSE, RESUME = "pause", "resume"
PAUSED, RESUMED = "container.paused", "container.resumed"


class FreezingService:
    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def pause(self, params: ContainerRef, call: Call) -> Empty:
        container = self._registry.get(params.container)
        async with container.changing:
            container.check("pause")
            try:
                container.status, container.change = Status.PAUSED, Change(PAUSE, call.mark)
                container.save()
                await container.runtime.pause(container.ident, call.timeout)
                if container.status is Status.PAUSED and not container.cgroup.frozen():
                    raise RuntimeFailure("pause", 0, "it reported success, and the container runs")
            except BaseException:
                _undo_pause(self._registry, container)
                raise
            if container.status is not Status.PAUSED:
                changes.end(self._registry, container)
                container.check("pause")  # init was killed meanwhile: what it is now is the answer
            call.commit()
            container.freeze_request = call.mark
            changes.end(self._registry, container)
            self._registry.events.publish(PAUSED, container.ident, INIT)
        return Empty()

    async def resume(self, params: ContainerRef, call: Call) -> Empty:
        container = self._registry.get(params.container)
        async with container.changing:
            container.check("resume")
            container.change = Change(RESUME, call.mark)
            changes.save(container)
            try:
                await container.runtime.resume(container.ident, call.timeout)
                if container.cgroup.frozen():
                    raise RuntimeFailure("resume", 0, "it reported success, and the container is frozen")
            except BaseException as error:
                if container.cgroup.frozen() or not isinstance(error, RuntimeFailure):
                    changes.end(self._registry, container)
                    raise
            call.commit()
            resumed = container.status is Status.PAUSED  # else it has ended as soon as it ran
            if resumed:
                container.status, container.freeze_request = Status.RUNNING, call.mark
            changes.end(self._registry, container)
            if resumed:
                self._registry.events.publish(RESUMED, container.ident, INIT)
        return Empty()


def settle(container: Container, change: Change, outcome: Outcome | None) -> bool:
    """Finishes what an earlier agent had begun, its runtime call having ended; returns whether it is done."""
    if container.status not in (Status.PAUSED, Status.RUNNING):
        return change.kind == RESUME and outcome is not None and outcome.status == 0
    if change.kind == PAUSE and outcome is not None and outcome.status != 0:
        container.cgroup.thaw()
    container.status = Status.PAUSED if container.cgroup.frozen() else Status.RUNNING
    done = container.status is (Status.PAUSED if change.kind == PAUSE else Status.RUNNING)
    if done:
        container.freeze_request = change.request
    return done


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


def _undo_pause(registry: Registry, container: Container) -> None:
    container.cgroup.thaw()
    if container.status is Status.PAUSED:
        container.status = Status.RUNNING
    changes.end(registry, container)
