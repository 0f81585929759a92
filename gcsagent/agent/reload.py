"""What an agent does first: finds out what its predecessor left, and goes on with it.

Three sources say what there is: the state directory (what was wanted, and what had been written down),
the supervisor (what is alive, what has ended, what is held, which runtime calls ended meanwhile), and the
runtime's and kernel's own traces (runc's state, cgroups). Where they differ the supervisor is right about
processes, and the state directory about what they are for:

* a launch that was under way is waited for, and then done or undone as a whole;
* a process whose exit came meanwhile is ended now, with the record kept for it;
* a live process nobody knows, a held descriptor nobody claims, a runc container or cgroup without a
  directory is removed;
* a directory that cannot be read is kept, and its container is FAILED, saying why.

Every difference that is put right is logged.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from gcsagent.agent import archives
from gcsagent.agent.container import Container
from gcsagent.agent.estate import Estate
from gcsagent.agent.fifo import Fifo
from gcsagent.agent.found import BROKEN, fill, mark, process_directories, read_document, slots
from gcsagent.agent.leftovers import kill_unknown, sweep, tell_of_deletions
from gcsagent.agent.process import Process
from gcsagent.agent.registry import Registry
from gcsagent.agent.runtime import (
    change_call,
    checkpoint_call,
    launch_call,
    start_call,
)
from gcsagent.agent.supervisor_client import SupervisorClient, SupervisorError
from protocol.checks import identifier
from protocol.schema import from_wire
from protocol.types import ExitRecord, Status, Stdio

if TYPE_CHECKING:
    from gcsagent.agent.checkpoint import CheckpointService
    from gcsagent.agent.finishing import Finisher

_log = logging.getLogger("agent.reload")


class Reloader:
    def __init__(self, registry: Registry, supervisor: SupervisorClient, slots: set[int]) -> None:
        self._registry, self._supervisor, self._others_slots = registry, supervisor, slots
        self.estate = Estate(registry, supervisor)
        self._cgroups_unclear = False
        self._later: list[Coroutine[Any, Any, None]] = []
        self._trash: list[str] = []

    @functools.cached_property
    def _finish(self) -> Finisher:
        """Loaded with the first container there is."""
        from gcsagent.agent.finishing import Finisher

        return Finisher(self._registry, self.estate, self._registry.checkpoints.get())

    @property
    def _checkpoints(self) -> CheckpointService | None:
        """None as long as nobody has made a checkpoint."""
        there = os.path.exists(os.path.join(self._registry.state, "checkpoints"))
        return self._registry.checkpoints.get() if there else None

    async def run(self) -> None:
        """Leaves the registry as the predecessor's was. What takes longer goes on in the background."""
        await self.estate.ask()
        self._trash = tell_of_deletions(self._registry, self.estate.events)
        documents = self._read_documents()
        claimed = {slot for _, found in documents for document in found.values() for slot in slots(document)}
        self._registry.keeper.counters.claim(claimed | self._others_slots)
        for container, found in documents:
            await self._restore(container, found)
        if self._checkpoints is not None:
            self._checkpoints.pend_deletions()
        await self._drop_leftovers()
        # Only now: undoing one container takes knowing what the others share with it.
        unfinished = [self._registry.spawn(work) for work in self._later]
        for container, process in self._registry.processes():
            self._registry.check_auto_delete(container, process)
        self._registry.spawn(self._sweep(unfinished))

    async def _sweep(self, unfinished: list[asyncio.Task[None]]) -> None:
        if self._checkpoints is not None:
            await self._checkpoints.sweep()
        await sweep(self._registry, unfinished, self._trash, cgroups=not self._cgroups_unclear)

    def _read_documents(self) -> list[tuple[Container, dict[str, dict[str, Any]]]]:
        """Every container directory, as a container and its processes' documents by directory name."""
        found = []
        for name in sorted(os.listdir(self._registry.directory)):
            if identifier(name) is not None:
                _log.warning("a directory that is no container's is left alone", extra={"directory": name})
                continue
            container = self._registry.add(name, self._registry.runtimes.default, False, {})
            if set(os.listdir(container.directory.path)) <= {"exited", "container.json.tmp"}:
                # Killed before the first word of it was written: nothing had been made, nobody was told.
                self._trash += filter(None, [container.directory.move_to_trash()])
                del self._registry.containers[name]
                continue
            try:
                documents = self._read_container(container)
            except BROKEN as error:
                self._set_aside(container, error)
                continue
            found.append((container, documents))
        return found

    def _read_container(self, container: Container) -> dict[str, dict[str, Any]]:
        path = container.directory.path
        container.directory.settle_doomed(self._registry.journal.answered)
        document = read_document(os.path.join(path, "container.json"))
        fill(container, document, self._registry)
        return {
            where: read_document(os.path.join(path, where, "process.json"))
            for where in process_directories(path)
        }

    def _set_aside(self, container: Container, error: BaseException) -> None:
        """Its files are kept as they are; a forced delete removes it, processes and all."""
        container.status = Status.FAILED
        for runtime in self._registry.runtimes:
            if container.ident in runtime.leftovers():
                container.runtime = runtime
        cgroup = self._registry.cgroup_tree.recovered(container.directory)
        if cgroup is None:
            self._cgroups_unclear = True
        else:
            container.cgroup = cgroup
        container.problem = (
            f"its state in {container.directory.path} cannot be read ({type(error).__name__}: {error})"
        )
        _log.error("a container's state is broken", extra={"container": container.ident, "error": str(error)})

    async def _restore(self, container: Container, documents: dict[str, dict[str, Any]]) -> None:
        try:
            for where, document in sorted(documents.items(), key=lambda item: item[1]["created_at_ns"]):
                await self._restore_process(container, where, document)
        except (*BROKEN, SupervisorError) as error:
            self._set_aside(container, error)
            return
        self._registry.oom.restore(container, self.estate.events)
        if container.role.sandbox is not None:
            from gcsagent.agent.pods import setup

            setup.limit_again(container)
        if container.status not in (Status.DELETING, Status.CREATING):
            self._registry.oom.begin(container)
        changing = container.change is not None or change_call(container.ident) in self.estate.calls
        if changing and container.checkpointing is None:  # else it is what the checkpoint began with
            self._finish.pend(container.change.request if container.change is not None else None)
            self._later.append(self._finish.change(container))
        if container.status is Status.DELETING:
            self.estate.note(container, "a deletion goes on")
            self.estate.end_what_has_ended(container)
            if container.delete_request is not None:
                # Its answer may be on disk already; it is true only when the deletion is through.
                self._registry.journal.begin(container.delete_request)
            self._finish.pend(container.create_request)
            self._later.append(self._finish.delete(container, self._finish.reopen(container.start_request)))
        elif container.status is Status.CREATING:
            self._finish.pend(container.create_request)
            self._later.append(self._finish.create(container))
        elif container.status is Status.CREATED and start_call(container.ident) in self.estate.calls:
            container.status = container.init.status = Status.CREATING
            known = self._finish.reopen(container.start_request)
            self._finish.pend(container.start_request)
            self._later.append(self._finish.start(container, known))
        elif container.checkpointing is not None:
            self._finish.pend(mark(container.checkpointing["request"]))
            self.estate.end_what_has_ended(container)
            self._later.append(self._registry.checkpoints.get().resume(container))
        else:
            self._finish.answered(container)
            self.estate.end_what_has_ended(container)

    async def _restore_process(self, container: Container, where: str, document: dict[str, Any]) -> None:
        process = Process(
            container.ident,
            str(document["process"]),
            tuple(document["args"]),
            from_wire(Stdio, document["stdio"]),
            bool(document["auto_delete"]),
        )
        process.created_at_ns, process.started_at_ns = document["created_at_ns"], document["started_at_ns"]
        process.request = mark(document.get("request"))
        process.slots = {name: list(slots) for name, slots in document["slots"].items()}
        for name, (path, device, inode) in document.get("fifos", {}).items():
            process.fifos[name] = Fifo(path, device, inode)
        container.processes[process.ident] = process
        self.estate.closing[process.key] = document.get("closing_at", {})
        if where.startswith(".new-"):
            self._resume_exec(container, process)
            return
        process.pid = document["pid"] or int(where)
        process.status = Status.RUNNING if process.started_at_ns else Status.CREATED
        process.pidfd = await self.estate.pidfd(process.key)
        self.estate.restore_streams(container, process)
        if document["exit"] is not None:
            process.restore_exit(from_wire(ExitRecord, document["exit"]))
            if where.isdigit():  # how it ended was written, and its directory not moved yet
                self._registry.retire(container, process)
            self.estate.publish_once("process.exited", container, process, process.pid, document["exit"])

    def _resume_exec(self, container: Container, process: Process) -> None:
        process.status = Status.CREATING
        if not process.is_init:
            self._finish.pend(process.request)
            self._later.append(self._finish.exec(container, process))

    async def _drop_leftovers(self) -> None:
        known = {
            process.key
            for container in self._registry.containers.values()
            for process in container.processes.values()
        }
        for key in set(self.estate.held) - known:
            _log.warning("descriptors of an unknown process are closed", extra={"fields": {"process": key}})
            self.estate.drop_held(key)
        for key in set(self.estate.exits) - known:
            self._supervisor.tell("forget_process", {"process": key})
        broken = {
            container.ident
            for container in self._registry.containers.values()
            if container.status is Status.FAILED
        }
        for key in set(self.estate.alive) - known:
            if key.partition("/")[0] not in broken:
                await kill_unknown(self._supervisor, key)
        expected = {launch_call(key) for key in known} | {
            name(ident)
            for ident in self._registry.containers
            for name in (start_call, change_call, checkpoint_call)
        }
        for key in self.estate.calls - expected:
            if key.startswith(archives.CALL):
                continue  # seen to by archives.resume
            self._registry.spawn(self._drain_call(key))

    async def _drain_call(self, key: str) -> None:
        """A mount, an rm, a delete: it may finish; what it did is found by looking."""
        await self._registry.caller.join(key)
        self._registry.caller.forget(key)


async def reload(registry: Registry, supervisor: SupervisorClient, slots: set[int]) -> None:
    """Restores what an earlier agent left. Exits that arrive meanwhile are taken up afterwards.

    ``slots`` are the counters used by what is not a process's.
    """
    reloader = Reloader(registry, supervisor, slots)
    supervisor.topics["exit"] = reloader.estate.exited
    await reloader.run()
    supervisor.topics["exit"] = registry.on_exit
    for record in reloader.estate.ended_since:
        registry.on_exit(record)
    await asyncio.sleep(0)  # let what was put in the background begin before anybody is served
