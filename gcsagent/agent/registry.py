"""Every container the agent knows, and what happens when one of their processes ends."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import hashlib
import logging
import os
import signal
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from gcsagent.agent import fifos, reach
from gcsagent.agent.archives import Archives
from gcsagent.agent.attachable import Keeper
from gcsagent.agent.bounds import Bounds
from gcsagent.agent.calls import Caller
from gcsagent.agent.cgroup_tree import CgroupTree
from gcsagent.agent.cgroups import Cgroup, CgroupMounts
from gcsagent.agent.container import Container
from gcsagent.agent.events import EventLog
from gcsagent.agent.journal import Journal, RequestMark, place_of
from gcsagent.agent.logs import context
from gcsagent.agent.oom import OomWatch
from gcsagent.agent.pods.pod import ALONE, Role, check_place, members, place
from gcsagent.agent.process import UNCLAIMED_SECONDS, Process
from gcsagent.agent.process_dir import ContainerDir, remove_process
from gcsagent.agent.quiet import Quiet
from gcsagent.agent.runtime import Launched, Runtime
from gcsagent.agent.runtimes import Runtimes
from gcsagent.agent.seeing.traffic import Traffic
from gcsagent.agent.turns import ASKED_BY
from protocol.checks import INIT
from protocol.errors import Code, RpcError
from protocol.schema import to_wire
from protocol.types import Status, Stdio

if TYPE_CHECKING:
    from gcsagent.agent.checkpoint import CheckpointService
    from gcsagent.agent.guest.pressure import PressureWatches
    from gcsagent.agent.guest.snapshot import SnapshotService
    from gcsagent.agent.later import Later
    from gcsagent.agent.storage.service import StorageService

DELETE_SECONDS = 60.0
"""How long the runtime may take to delete a container, if nobody says otherwise."""

_log = logging.getLogger("agent.registry")


class Registry:
    def __init__(
        self,
        state: str,
        guest: bool,
        runtimes: Runtimes,
        caller: Caller,
        keeper: Keeper,
        events: EventLog,
        cgroups: CgroupMounts,
        oom: OomWatch,
        bounds: Bounds | None = None,
    ) -> None:
        self.bounds, self.guest = bounds or Bounds(), guest
        self.own_network = guest  # whether that of the machine is ours to change; see gcsagent.agent.app
        self.runtimes, self.caller, self.keeper, self.events, self.cgroups, self.oom = (
            runtimes,
            caller,
            keeper,
            events,
            cgroups,
            oom,
        )
        self.state = state
        self.directory = os.path.join(state, "containers")
        self.pipes = os.path.join(state, "pipes")
        # Two agents on one machine (development, tests) must not share cgroups; in a guest there is one.
        own = "" if guest else "-" + hashlib.sha256(state.encode()).hexdigest()[:8]
        self.cgroup_tree = CgroupTree(cgroups, f"/gcs{own}")
        self._background: set[asyncio.Task[None]] = set()
        self.journal, self.traffic, self.quiet = Journal(state), Traffic(), Quiet()
        self.archives = Archives(self, state)
        self.tear_down: Callable[[Container, float], Coroutine[Any, Any, None]]  # wired in gcsagent.agent.app
        self.storage: Later[StorageService]  # likewise
        self.snapshots: Later[SnapshotService]  # likewise
        self.checkpoints: Later[CheckpointService]  # likewise
        self.pressure: Later[PressureWatches]  # likewise
        self.containers: dict[str, Container] = {}
        os.makedirs(self.directory, mode=0o711, exist_ok=True)

    # -- looking up -----------------------------------------------------------------------------

    def get(self, ident: str) -> Container:
        container = self.containers.get(ident)
        if container is None:
            raise RpcError(Code.NOT_FOUND, f"there is no container {ident}")
        return container

    def new(
        self,
        ident: str,
        runtime: Runtime,
        auto_delete: bool,
        labels: dict[str, str],
        cgroup_name: str = "",
        stdio: Stdio | None = None,
        role: Role = ALONE,
    ) -> Container:
        """A container in status CREATING, its cgroup ``cgroup_name`` below ours if given.

        Raises ALREADY_EXISTS, RESOURCE_EXHAUSTED, and INVALID_ARGUMENT or FAILED_PRECONDITION for a cgroup
        that cannot be its.
        """
        if ident in self.containers:
            raise RpcError(Code.ALREADY_EXISTS, f"there is a container {ident} already")
        self.bounds.check_create(stdio or Stdio(), self.containers.values())
        where = place(ident, cgroup_name, role, self.cgroup_tree.root, self.containers)
        cgroup = self.cgroup_tree.at(where)
        check_place(cgroup.path, role, self.containers.values())
        container = self.add(ident, runtime, auto_delete, labels, cgroup)
        container.role = role
        return container

    def add(
        self,
        ident: str,
        runtime: Runtime,
        auto_delete: bool,
        labels: dict[str, str],
        cgroup: Cgroup | None = None,
    ) -> Container:
        """A container that is there already, in status CREATING as long as nothing else is known of it."""
        cgroup = cgroup or self.cgroup_tree.at(ident)
        directory = ContainerDir(self.directory, ident)
        container = Container(ident, directory, cgroup, runtime, auto_delete=auto_delete, labels=labels)
        self.containers[ident] = container
        return container

    def cgroup_paths(self) -> set[str]:
        return {container.cgroup.path for container in self.containers.values()}

    # -- processes ------------------------------------------------------------------------------

    def processes(self) -> list[tuple[Container, Process]]:
        """Every process there is, with its container."""
        return [(each, process) for each in self.containers.values() for process in each.processes.values()]

    def process_started(self, container: Container, process: Process, launched: Launched) -> None:
        """The runtime has made the process: from here on it has a pid, and its end is recorded."""
        process.pid, process.pidfd = launched.pid, launched.pidfd if launched.pidfd is not None else -1
        container.directory.settle(process.ident, process.pid)

    def running(self, container: Container, process: Process, started_at_ns: int) -> None:
        """It is known to be the caller's program now. If it has ended meanwhile, that comes right behind."""
        process.started_at_ns = started_at_ns
        process.status = Status.RUNNING
        container.directory.update(process.pid, process.document())
        self.events.publish("process.started", container.ident, process.ident, pid=process.pid)
        if process.is_init:
            self.events.publish("container.started", container.ident, INIT)
        self.take_early_exit(container, process)

    def take_early_exit(self, container: Container, process: Process) -> None:
        if process.early_exit is not None and process.exit is None:
            self._end(container, process, process.early_exit)

    def on_exit(self, record: dict[str, Any]) -> None:
        """The supervisor's notification that a claimed process has ended."""
        ident, _, process_ident = record["process"].partition("/")
        container = self.containers.get(ident)
        process = container.processes.get(process_ident) if container is not None else None
        if container is None or process is None:
            self.keeper.supervisor.tell("forget_process", {"process": record["process"]})
        elif process.status is Status.CREATING and container.status is Status.DELETING:
            process.end(record, None)  # its launch is being undone, which waits for this; nobody is told
        elif process.status is Status.CREATING:
            process.early_exit = record  # still being launched: whoever launches it takes this up
        elif process.exit is None:
            self._end(container, process, record)

    def retire(self, container: Container, process: Process) -> None:
        """Writes down how it ended; then the supervisor need not know it any longer."""
        try:
            container.directory.retire(process.ident, process.pid, process.document())
        except OSError as error:  # the supervisor keeps it, for the next agent to try again
            log = context(_log, container=container.ident, process=process.ident)
            log.error("the exit record cannot be written", extra={"error": str(error)})
        else:
            self.keeper.supervisor.tell("forget_process", {"process": process.key})

    def _end(self, container: Container, process: Process, record: dict[str, Any]) -> None:
        log = context(_log, container=container.ident, process=process.ident)
        killed = os.waitstatus_to_exitcode(record["status"]) == -signal.SIGKILL
        victim, oom = self.oom.blame(container, process, killed)
        exit_record = process.end(record, oom, victim)
        self.retire(container, process)
        self.events.publish("process.exited", container.ident, process.ident, **to_wire(exit_record))
        log.info(
            "process ended", extra={"exit_code": exit_record.exit_code, "reason": exit_record.reason.value}
        )
        if process.is_init:
            self.init_ended(container)
        self.check_auto_delete(container, process)

    def init_ended(self, container: Container) -> None:
        """Its container has stopped; what is left in it is ended, too."""
        if container.status in (Status.CREATED, Status.RUNNING, Status.PAUSED, Status.CREATING):
            container.status = Status.STOPPED
        if container.owns_pids:  # the kernel has ended all else in it
            self.events.publish("container.stopped", container.ident, INIT)
        else:
            container.sweep = asyncio.get_running_loop().create_task(self._sweep(container))
            self._background.add(container.sweep)
            container.sweep.add_done_callback(self._background_done)

    async def _sweep(self, container: Container) -> None:
        await reach.kill_everybody(container.cgroup, self.oom.files)
        if not await reach.wait_until_empty(container.cgroup, self.oom.files):
            context(_log, container=container.ident).error("processes left behind by init do not end")
        self.events.publish("container.stopped", container.ident, INIT)

    # -- endings --------------------------------------------------------------------------------

    def stream_ended(self, container: Container, process: Process, stream: str, count: int) -> None:
        self.events.publish("stream.end", container.ident, process.ident, stream=stream, bytes=count)
        if process.exit is not None:
            # Not from inside the stream's own callback: deletion closes the stream.
            asyncio.get_running_loop().call_soon(self.check_auto_delete, container, process)

    def check_auto_delete(self, container: Container, process: Process) -> None:
        """Deletes what asked for it once it has ended and nobody is owed its output any more."""
        wanted = container.auto_delete if process.is_init else process.auto_delete
        there = self.containers.get(container.ident) is container
        if not wanted or not there or not (process.finished or self._forsaken(container, process)):
            return
        if container.checkpointing is not None:
            return  # asked again when that is through
        if process.is_init:
            if container.status is Status.STOPPED and not members(self.containers.values(), container.ident):
                self.spawn(self.delete(container))
        elif process.ident in container.processes:
            self.forget_process(container, process)

    def _forsaken(self, container: Container, process: Process) -> bool:
        """Whether it has ended and nobody came for what it wrote; if not yet, that is looked at again."""
        if process.exit is None:
            return False
        now, at = asyncio.get_running_loop().time(), process.forsaken_at()
        if at is not None and at <= now:
            log = context(_log, container=container.ident, process=process.ident)
            log.warning("nobody came for its output", extra={"process_args": process.args})
            return True
        if process.claim_timer is None:
            delay = UNCLAIMED_SECONDS if at is None else at - now
            timer = asyncio.get_running_loop().call_later(delay, self._look_again, container, process)
            process.claim_timer = timer
        return False

    def _look_again(self, container: Container, process: Process) -> None:
        process.claim_timer = None
        self.check_auto_delete(container, process)

    async def delete(self, container: Container, seconds: float = DELETE_SECONDS, asked_by: int = 0) -> None:
        """Removes a container and every trace of it; whoever else asks meanwhile waits for the same.

        ``asked_by`` is the connection in whose turn that is (agent.turns). Goes on when its caller is
        cancelled. Raises RpcError when something resists, such as a runtime that takes longer than
        ``seconds``.
        """
        if container.deletion is None or container.deletion.done():
            context = contextvars.copy_context()
            context.run(ASKED_BY.set, asked_by)
            work = self.tear_down(container, seconds)
            container.deletion = asyncio.get_running_loop().create_task(work, context=context)
            self._background.add(container.deletion)
            container.deletion.add_done_callback(self._deletion_done)
        await asyncio.shield(container.deletion)

    def delete_process(
        self, container: Container, process: Process, mark: RequestMark | None, answer: object
    ) -> None:
        """Removes an exec that has ended, as a request asks that is answered so: wholly, or not at all."""
        self._remove_fifos(container, process)
        place, doomed = place_of(mark.ident) if mark is not None else "", ""
        with contextlib.suppress(OSError):  # a full disk: after a kill just now it is merely listed again
            doomed = container.directory.doom(process.ident, place)
        self.journal.record(mark, answer)
        self._drop(container, process)
        if doomed:
            remove_process(doomed)
        else:
            container.directory.discard(process.ident, process.pid)

    def _remove_fifos(self, container: Container, process: Process) -> None:
        try:
            fifos.remove_made(self.containers, process)
        except OSError as error:
            log = context(_log, container=container.ident, process=process.ident)
            log.error("a fifo cannot be removed", extra={"error": str(error)})

    def forget_process(self, container: Container, process: Process) -> None:
        """Removes an exec that has ended, or never began."""
        self._remove_fifos(container, process)
        self._drop(container, process)
        container.directory.discard(process.ident, process.pid)

    def _drop(self, container: Container, process: Process) -> None:
        process.close()
        container.processes.pop(process.ident, None)
        # One that ended while its container was being deleted has not been retired.
        self.keeper.supervisor.tell("forget_process", {"process": process.key})

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Runs ``work`` on its own; what it raises is logged."""
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background_done)
        return task

    def _deletion_done(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled():
            task.exception()  # teardown has logged it, and whoever still waits is told

    def _background_done(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled() and task.exception() is not None:
            _log.error("work in the background failed", exc_info=task.exception())
