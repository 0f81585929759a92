"""Removes what belongs to no container: only the runtime, the kernel or the disk still know of it."""

from __future__ import annotations

import asyncio
import logging
import os
import signal

from gcsagent.agent import reach
from gcsagent.agent.logs import context
from gcsagent.agent.process_dir import untold_deletion
from gcsagent.agent.registry import Registry
from gcsagent.agent.runtime import Runtime, RuntimeFailure
from gcsagent.agent.supervisor_client import SupervisorClient, SupervisorError
from protocol.types import Event

SECONDS = 60.0
AT_ONCE = 64
"""Paths for one ``rm``: its command line goes through the supervisor."""

_log = logging.getLogger("agent.leftovers")


def tell_of_deletions(registry: Registry, events: list[Event]) -> list[str]:
    """Before anything else is told: of containers that were gone already, and nobody had said so.

    Returns what there is in the trash: what comes later is not an earlier agent's.
    """
    trash = os.path.join(registry.state, "trash")
    found = os.listdir(trash) if os.path.isdir(trash) else []
    for name in found:
        container, after = untold_deletion(name) or ("", -1)
        forgotten = bool(events) and events[0].seq > after + 1  # long ago: it was told
        told = any(
            event.type == "container.deleted" and event.container == container and event.seq > after
            for event in events
        )
        if after >= 0 and not told and not forgotten and after <= registry.events.last:
            context(_log, container=container).info("its deletion had not been told")
            registry.events.publish("container.deleted", container)
    return [os.path.join(trash, name) for name in found]


async def sweep(
    registry: Registry, unfinished: list[asyncio.Task[None]], trash: list[str], *, cgroups: bool
) -> None:
    """Once, behind a start. Without ``cgroups`` unknown ones stay: they may be a broken container's."""
    registry.runtimes.default.forget_earlier_logs()
    known = registry.containers.keys()
    for runtime in registry.runtimes:
        for ident in runtime.leftovers() - known:
            await _delete_unknown(runtime, ident)
    for cgroup in list(registry.cgroup_tree.unknown(registry.cgroup_paths())):
        if not cgroups:
            _log.warning("an unknown cgroup is left alone: it may be a broken container's")
            break
        _log.warning("a cgroup without a container is removed", extra={"fields": {"cgroup": cgroup.path}})
        await reach.kill_everybody(cgroup, registry.oom.files)
        cgroup.remove()
    for start in range(0, len(trash), AT_ONCE):
        await registry.caller.run(["rm", "-rf", "--", *trash[start : start + AT_ONCE]], SECONDS)
    if unfinished:
        await asyncio.wait(unfinished)
        registry.runtimes.default.forget_earlier_logs()  # a call that went on may have made its own late


async def _delete_unknown(runtime: Runtime, ident: str) -> None:
    log = context(_log, container=ident)
    log.warning("a container only the runtime knows is deleted", extra={"fields": {"runtime": runtime.name}})
    try:
        await runtime.delete(ident, SECONDS)
    except RuntimeFailure as error:
        log.error("that failed", extra={"error": str(error)})


async def kill_unknown(supervisor: SupervisorClient, key: str) -> None:
    _log.warning("a process nobody knows is killed", extra={"fields": {"process": key}})
    try:
        _, fds = await supervisor.request("pidfd", {"process": key})
    except SupervisorError:
        return  # it has ended by itself
    try:
        signal.pidfd_send_signal(fds[0], signal.SIGKILL)
    except ProcessLookupError:
        pass
    finally:
        os.close(fds[0])
