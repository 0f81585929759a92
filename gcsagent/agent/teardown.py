"""Deletes a container: every trace of it, in the order that lets each step succeed.

Processes first (they hold mounts and cgroups), then the runtime's own state, cgroups, the overlay, the
descriptors, and the state directory last: it is what a restarted agent would find it by.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os

from tenacity import AsyncRetrying, RetryError, retry_if_result, stop_after_delay, wait_exponential

from gcsagent.agent import fifos, overlay, reach
from gcsagent.agent.calls import CannotStart
from gcsagent.agent.cgroups import Cgroup
from gcsagent.agent.container import Container
from gcsagent.agent.failures import to_rpc_error
from gcsagent.agent.logs import context
from gcsagent.agent.pods import ending
from gcsagent.agent.process_dir import empty_few
from gcsagent.agent.registry import DELETE_SECONDS, Registry
from gcsagent.agent.runtime import RuntimeFailure, RuntimeMissing
from protocol.checks import INIT
from protocol.errors import Code, RpcError
from protocol.families.container import Deleted
from protocol.types import Status

KILL_SECONDS = 10.0
VISITOR_SECONDS = 15.0
CGROUP_SECONDS = 5.0

_SAID_AS_IT_IS = (Code.DEADLINE_EXCEEDED, Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED)

_log = logging.getLogger("agent.teardown")


async def tear_down(registry: Registry, container: Container, seconds: float) -> None:
    """Leaves nothing; or raises RpcError, the container staying visible as FAILED with what is in the way.

    ``seconds`` is how long the runtime may take.
    """
    container.status = Status.DELETING
    log = context(_log, container=container.ident)
    try:
        container.save()  # an agent that finds this goes on from here
    except OSError as error:
        log.warning("a deletion cannot be written down", extra={"error": str(error)})
    await _send_away(container)
    try:
        await ending.delete_members(registry, container, seconds)
        async with container.changing:  # a pause under way would freeze again what is being killed
            await _kill_processes(registry, container)
        await _delete_in_runtime(container, seconds)
        registry.oom.end(container)
        for cgroup in ending.cgroups(registry, container):
            await _remove_cgroups(registry, cgroup)
        others = registry.cgroup_paths() - {container.cgroup.path}
        registry.cgroup_tree.prune(container.cgroup.path, others)
        await overlay.unmount(registry.caller, container.directory)
        await ending.unmount(registry, container)
        for process in list(container.processes.values()):
            fifos.remove_made(registry.containers, process)
            process.close()
            registry.keeper.supervisor.tell("forget_process", {"process": process.key})
        init = container.processes.get(INIT)
        registry.journal.record(container.delete_request, Deleted(init.exit if init is not None else None))
        trash = await _remove_directory(registry, container)
    except (RpcError, RuntimeFailure, CannotStart, OSError, TimeoutError) as error:
        cause = to_rpc_error(error)
        container.status, container.problem = Status.FAILED, cause.message
        log.error("a container cannot be cleaned up", extra={"error": str(error)})
        raise RpcError(
            cause.code if cause.code in _SAID_AS_IT_IS else Code.INTERNAL,
            f"container {container.ident} could not be removed whole: {cause.message};"
            " solve that and delete it again",
            **cause.details,
        ) from error
    registry.containers.pop(container.ident, None)
    registry.events.publish("container.deleted", container.ident)
    if trash is not None:
        with contextlib.suppress(OSError):
            os.rmdir(trash)
    ending.deleted(registry, container)
    log.info("container deleted")


async def _send_away(container: Container) -> None:
    """Ends the work of archivers: while they have its root directory, that cannot be unmounted."""
    visitors = list(container.visitors)
    for visitor in visitors:
        visitor.cancel()
    if visitors:
        await asyncio.wait(visitors, timeout=VISITOR_SECONDS)


async def _kill_processes(registry: Registry, container: Container) -> None:
    for process in container.processes.values():
        if process.early_exit is not None and process.exit is None:
            process.end(process.early_exit, None)  # kept for a launch that will not be finished
    alive = [process for process in container.processes.values() if process.alive]
    if container.sweep is not None:
        await asyncio.wait([container.sweep])
    await reach.kill_everybody(container.cgroup, registry.oom.files)
    for process in alive:
        process.kill()
    try:
        async with asyncio.timeout(KILL_SECONDS):
            for process in alive:
                await process.wait()
    except TimeoutError as error:
        left = [process.pid for process in alive if process.exit is None]
        raise RpcError(
            Code.INTERNAL, f"processes {left} do not end {KILL_SECONDS:g} s after SIGKILL"
        ) from error


async def _delete_in_runtime(container: Container, seconds: float) -> None:
    try:
        await container.runtime.delete(container.ident, seconds)
    except RuntimeMissing:
        if any(process.pid for process in container.processes.values()):
            raise  # it knows the container, and now it is gone itself
    except RuntimeFailure as failure:
        if failure.timed_out or container.ident in container.runtime.leftovers():
            raise
        # It is gone from the runtime: what failed is a poststop hook, which undoes no deletion (config.md).
        context(_log, container=container.ident).warning(
            "a hook failed after the container's end", extra={"error": str(failure)}
        )


async def _remove_cgroups(registry: Registry, cgroup: Cgroup) -> None:
    """The kernel lets a cgroup go a moment after its last process has been reaped; v1 does not say when."""
    attempts = AsyncRetrying(
        retry=retry_if_result(bool),
        stop=stop_after_delay(CGROUP_SECONDS),
        wait=wait_exponential(multiplier=0.01, max=0.5),
    )
    try:
        await attempts(_try_remove_cgroups, registry, cgroup)
    except RetryError as error:
        raise RpcError(Code.INTERNAL, f"cgroups are still in use: {error.last_attempt.result()}") from error


async def _try_remove_cgroups(registry: Registry, cgroup: Cgroup) -> list[str]:
    left = cgroup.remove()
    if left:
        await reach.kill_everybody(cgroup, registry.oom.files)
    return left


async def _remove_directory(registry: Registry, container: Container) -> str | None:
    """Renamed first, so that it is there whole or not at all. An upper layer may hold any number of files:
    ``rm`` removes them without holding up the agent; for a few it is not worth a process.

    Returns what is left: an empty directory, whose name has a successor tell of the end, if need be.
    """
    trash = container.directory.move_to_trash(registry.events.last)
    if trash is None or empty_few(trash):
        return trash
    left = [os.path.join(trash, name) for name in os.listdir(trash)]
    outcome = await registry.caller.run(["rm", "-rf", "--", *left], DELETE_SECONDS)
    if outcome.status != 0:
        raise OSError(f"rm: {outcome.stderr}")
    return trash
