"""The method table of the agent: which function answers which request of the contract.

Explicit, and held against the contract by a test: nothing that came off the wire is ever used to look up an
attribute. ``agent.hello`` and ``stream.attach`` change the connection they arrive on and are the session's
own (:mod:`gcsagent.agent.session`); so are ``events.subscribe`` and ``archive.*``. Most services are made
when the first request for them comes (:mod:`gcsagent.agent.later`).
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from gcsagent.agent import services
from gcsagent.agent.info import AgentService
from gcsagent.agent.later import Handler, Later, Unloaded
from gcsagent.agent.processes import ProcessService
from gcsagent.agent.registry import Registry
from gcsagent.agent.seeing.logring import LogRing
from gcsagent.agent.signals import SignalService
from gcsagent.agent.takeover import Opener, Takeover

if TYPE_CHECKING:
    from gcsagent.agent.forwarding.service import Forwards

SESSION_METHODS = frozenset({"agent.hello", "agent.ping", "events.subscribe", "archive.put", "archive.get"})


def openers(forwards: Later[Forwards]) -> dict[str, Opener]:
    """Of the methods that turn their connection into a stream, beside stream.attach."""

    async def open_forward(params: Any) -> Takeover:
        return await forwards.get().open(params)

    return {"forward.open": open_forward}


def build(
    registry: Registry, agent: AgentService, forwards: Later[Forwards], log: LogRing | None = None
) -> dict[str, Handler | Unloaded]:
    lifecycle, freezing = services.lifecycle(registry), services.freezing(registry)
    checkpoints, pods, spools = registry.checkpoints, services.pods(registry), services.spools(registry)
    processes = ProcessService(registry)

    return {
        "agent.info": agent.info,
        "agent.shutdown": agent.shutdown,
        "agent.upgrade": agent.upgrades.upgrade,
        "agent.upgrade_status": agent.upgrades.status,
        "container.create": lifecycle.handler(lambda service: service.create),
        "container.start": lifecycle.handler(lambda service: service.start),
        "container.state": services.states(registry).handler(lambda service: service.state),
        "container.list": services.lists(registry).handler(lambda service: service.page),
        "container.processes": services.process_lists(registry).handler(lambda service: service.processes),
        "container.kill": SignalService(registry).kill,
        "container.pause": freezing.handler(lambda service: service.pause),
        "container.resume": freezing.handler(lambda service: service.resume),
        "container.checkpoint": checkpoints.handler(lambda service: service.checkpoint),
        "container.restore": services.restoring(registry, lifecycle).handler(lambda service: service.restore),
        "checkpoint.list": checkpoints.handler(lambda service: service.list_all),
        "checkpoint.delete": checkpoints.handler(lambda service: service.delete),
        "container.stats": services.stats(registry).handler(lambda service: service.stats),
        "container.update": services.limits(registry).handler(lambda service: service.update),
        "container.wait": lifecycle.handler(lambda service: service.wait),
        "container.delete": lifecycle.handler(lambda service: service.delete),
        "pod.update": pods.handler(lambda service: service.update),
        "pod.stats": pods.handler(lambda service: service.stats),
        "process.exec": lifecycle.handler(lambda service: service.exec),
        "process.state": processes.state,
        "process.kill": processes.kill,
        "process.resize": processes.resize,
        "process.close_stdin": processes.close_stdin,
        "process.wait": processes.wait,
        "process.delete": processes.delete,
        "stream.ack": spools.handler(lambda service: service.acknowledge),
        "stream.find": spools.handler(lambda service: service.find),
        "forward.wait": forwards.handler(lambda service: service.wait),
        "forward.close_write": forwards.handler(lambda service: service.close_write),
        **_seeing(registry, agent, log or LogRing(None, agent.generation)),
        **_guest(registry),
        **_storage(registry),
        **_network(registry),
    }


def _together(make: Callable[[], dict[str, Handler]], *names: str) -> dict[str, Unloaded]:
    """Methods whose handlers come as one table."""
    table = Later(make)
    return {name: table.handler(itemgetter(name)) for name in names}


def _seeing(registry: Registry, agent: AgentService, log: LogRing) -> dict[str, Unloaded]:
    def make() -> dict[str, Handler]:
        from gcsagent.agent.seeing.table import handlers

        return handlers(registry, agent, log)

    return _together(make, "agent.metrics", "agent.stacks", "agent.log_level", "agent.logs")


def _guest(registry: Registry) -> dict[str, Unloaded]:
    def make() -> dict[str, Handler]:
        from gcsagent.agent.guest.table import handlers

        return handlers(registry)

    return _together(
        make,
        "guest.time",
        "guest.set_time",
        "guest.entropy",
        "guest.add_entropy",
        "guest.resources",
        "guest.online",
        "guest.watch_pressure",
        "guest.unwatch_pressure",
        "guest.snapshot_prepare",
        "guest.snapshot_resume",
    )


def _storage(registry: Registry) -> dict[str, Unloaded]:
    return _together(
        lambda: registry.storage.get().handlers(),
        "storage.mount",
        "storage.unmount",
        "storage.list",
        "storage.trim",
        "storage.freeze",
        "storage.thaw",
    )


def _network(registry: Registry) -> dict[str, Unloaded]:
    def make() -> dict[str, Handler]:
        from gcsagent.agent.network.table import handlers

        return handlers(registry)

    return _together(make, "network.apply", "network.attach", "network.state", "network.remove")
