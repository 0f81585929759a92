"""The method table of the agent: which function answers which request of the contract.

Explicit, and checked against the contract when it is built: nothing that came off the wire is ever used
to look up an attribute. ``agent.hello`` and ``stream.attach`` change the connection they arrive on and
are the session's own (:mod:`gcsagent.agent.session`); so are ``events.subscribe`` and ``archive.*``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from gcsagent.agent.call import Call
from gcsagent.agent.cgroup_stats import StatsService
from gcsagent.agent.checkpoint import CheckpointService
from gcsagent.agent.container_list import ContainerListService
from gcsagent.agent.forwarding.service import Forwards
from gcsagent.agent.freezing import FreezingService
from gcsagent.agent.guest import table as guest
from gcsagent.agent.info import AgentService
from gcsagent.agent.lifecycle import Lifecycle
from gcsagent.agent.limits import LimitService
from gcsagent.agent.network import table as network
from gcsagent.agent.pods.service import PodService
from gcsagent.agent.process_list import ProcessListService
from gcsagent.agent.processes import ProcessService
from gcsagent.agent.registry import Registry
from gcsagent.agent.restoring import RestoreService
from gcsagent.agent.runtime_view import StateService
from gcsagent.agent.seeing import table as seeing
from gcsagent.agent.seeing.logring import LogRing
from gcsagent.agent.signals import SignalService
from gcsagent.agent.spools import SpoolService
from gcsagent.agent.takeover import Opener
from protocol.methods import ATTACH, ELSEWHERE, METHODS, STREAMING

Handler = Callable[[Any, Call], Any | Awaitable[Any]]

SESSION_METHODS = frozenset({"agent.hello", "agent.ping", "events.subscribe", "archive.put", "archive.get"})


def openers(forwards: Forwards) -> dict[str, Opener]:
    """Of the methods that turn their connection into a stream, beside stream.attach."""
    table: dict[str, Opener] = {"forward.open": forwards.open}
    missing = (STREAMING - ELSEWHERE) ^ (table.keys() | {ATTACH})
    if missing:
        raise AssertionError(f"the methods that stream and the contract differ: {sorted(missing)}")
    return table


def build(
    registry: Registry, agent: AgentService, forwards: Forwards, log: LogRing | None = None
) -> dict[str, Handler]:
    lifecycle, processes, spools = Lifecycle(registry), ProcessService(registry), SpoolService(registry)
    freezing, checkpoints = FreezingService(registry), CheckpointService(registry)
    pods = PodService(registry)

    table: dict[str, Handler] = {
        "agent.info": agent.info,
        "agent.shutdown": agent.shutdown,
        "agent.upgrade": agent.upgrades.upgrade,
        "agent.upgrade_status": agent.upgrades.status,
        "container.create": lifecycle.create,
        "container.start": lifecycle.start,
        "container.state": StateService(registry).state,
        "container.list": ContainerListService(registry).page,
        "container.processes": ProcessListService(registry).processes,
        "container.kill": SignalService(registry).kill,
        "container.pause": freezing.pause,
        "container.resume": freezing.resume,
        "container.checkpoint": checkpoints.checkpoint,
        "container.restore": RestoreService(registry, lifecycle).restore,
        "checkpoint.list": checkpoints.list_all,
        "checkpoint.delete": checkpoints.delete,
        "container.stats": StatsService(registry).stats,
        "container.update": LimitService(registry).update,
        "container.wait": lifecycle.wait,
        "container.delete": lifecycle.delete,
        "pod.update": pods.update,
        "pod.stats": pods.stats,
        "process.exec": lifecycle.exec,
        "process.state": processes.state,
        "process.kill": processes.kill,
        "process.resize": processes.resize,
        "process.close_stdin": processes.close_stdin,
        "process.wait": processes.wait,
        "process.delete": processes.delete,
        "stream.ack": spools.acknowledge,
        "stream.find": spools.find,
        "forward.wait": forwards.wait,
        "forward.close_write": forwards.close_write,
        **seeing.handlers(registry, agent, log or LogRing(None, agent.generation)),
        **guest.handlers(registry),
        **registry.storage.handlers(),
        **network.handlers(registry),
    }
    missing = METHODS.keys() ^ (table.keys() | SESSION_METHODS | STREAMING | ELSEWHERE)
    if missing:
        raise AssertionError(f"the method table and the contract differ: {sorted(missing)}")
    return table
