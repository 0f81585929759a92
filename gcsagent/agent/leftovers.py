"""Removes what belongs to no container: only the runtime, the kernel or the disk still know of it."""

from __future__ import annotations

import asyncio
import logging
import os
import signal

from gcsagent.agent import reach
from gcsagent.agent.logs import context
from gcsagent.agent.registry import Registry
from gcsagent.agent.runtime import Runtime, RuntimeFailure
from gcsagent.agent.supervisor_client import SupervisorClient, SupervisorError

SECONDS = 60.0

_log = logging.getLogger("agent.leftovers")


async def sweep(registry: Registry, unfinished: list[asyncio.Task[None]], *, cgroups: bool) -> None:
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
    trash = os.path.join(os.path.dirname(registry.directory), "trash")
    if os.path.isdir(trash) and os.listdir(trash):
        await registry.caller.run(["rm", "-rf", "--", trash], SECONDS)
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
