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
import contextlib
import logging
import os
import time
from collections.abc import Coroutine
from typing import Any

from gcsagent.agent import freezing, stdio
from gcsagent.agent.calls import Outcome, end_launched
from gcsagent.agent.checkpoint import CheckpointService
from gcsagent.agent.container import Container
from gcsagent.agent.events import of_this_life
from gcsagent.agent.failures import to_rpc_error
from gcsagent.agent.fifo import Fifo
from gcsagent.agent.found import fill, mark, process_directories, read_document, slots
from gcsagent.agent.journal import UNDONE, RequestMark
from gcsagent.agent.leftovers import kill_unknown, sweep
from gcsagent.agent.lifecycle import Lifecycle
from gcsagent.agent.logs import context
from gcsagent.agent.pods import setup
from gcsagent.agent.process import Process
from gcsagent.agent.registry import Registry
from gcsagent.agent.restoring import restored
from gcsagent.agent.runtime import (
    Launched,
    RuntimeFailure,
    change_call,
    checkpoint_call,
    launch_call,
    start_call,
)
from gcsagent.agent.supervisor_client import SupervisorClient, SupervisorError
from gcsagent.agent.unfinished import finish_change
from gcsagent.common.channel import MAX_FDS
from protocol.checks import INIT, identifier
from protocol.errors import RpcError
from protocol.families.container import Created, Deleted
from protocol.schema import SchemaError, from_wire
from protocol.types import Event, ExitRecord, Reason, Status, Stdio

_log = logging.getLogger("agent.reload")

_BROKEN = (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, SchemaError)
"""What reading a state file that is missing, truncated or not ours can raise."""


class Reloader:
    def __init__(self, registry: Registry, supervisor: SupervisorClient) -> None:
        self._registry, self._supervisor = registry, supervisor
        self._lifecycle, self._checkpoints = Lifecycle(registry), CheckpointService(registry)
        self._held: dict[str, dict[str, dict[str, int]]] = {}  # process key -> stream -> suffix -> fd
        self._alive: dict[str, int] = {}
        self._exits: dict[str, dict[str, Any]] = {}
        self._calls: set[str] = set()
        self._told: set[tuple[str, str, str, Any]] = set()
        self._freezes_told: dict[str, str] = {}
        self._cgroups_unclear = False
        self._events: list[Event] = []
        self._closing: dict[str, dict[str, int]] = {}
        self._later: list[Coroutine[Any, Any, None]] = []

    async def run(self) -> None:
        """Leaves the registry as the predecessor's was. What takes longer goes on in the background."""
        await self._ask_supervisor()
        events = self._events = list(self._registry.events.all())
        self._told = {
            (event.type, event.container, event.process, event.data.get("stream", event.data.get("pid")))
            for event in events
        }
        self._freezes_told = freezing.last_told(events)
        documents = self._read_documents()
        claimed = {slot for _, found in documents for document in found.values() for slot in slots(document)}
        self._registry.keeper.counters.claim(claimed)
        for container, found in documents:
            await self._restore(container, found)
        self._checkpoints.pend_deletions()
        await self._drop_leftovers()
        # Only now: undoing one container takes knowing what the others share with it.
        unfinished = [self._registry.spawn(work) for work in self._later]
        for container, process in self._registry.processes():
            self._registry.check_auto_delete(container, process)
        self._registry.spawn(self._sweep(unfinished))

    async def _sweep(self, unfinished: list[asyncio.Task[None]]) -> None:
        await self._checkpoints.sweep()
        await sweep(self._registry, unfinished, cgroups=not self._cgroups_unclear)

    # -- what there is --------------------------------------------------------------------------

    async def _ask_supervisor(self) -> None:
        self._calls = {key for key, _ in await self._supervisor.everything("calls")}
        self._alive = dict(await self._supervisor.everything("processes"))
        self._exits = dict(await self._supervisor.everything("exits"))
        names = [name for name in await self._supervisor.everything("names") if name.startswith("fd/")]
        for start in range(0, len(names), MAX_FDS):
            batch = names[start : start + MAX_FDS]
            _, fds = await self._supervisor.request("fetch", {"names": batch})
            for name, fd in zip(batch, fds, strict=True):
                _, container, process, stream = name.split("/")
                stream, _, suffix = stream.partition(".")
                self._held.setdefault(f"{container}/{process}", {}).setdefault(stream, {})[suffix] = fd

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
                container.directory.move_to_trash()
                del self._registry.containers[name]
                continue
            try:
                documents = self._read_container(container)
            except _BROKEN as error:
                self._set_aside(container, error)
                continue
            found.append((container, documents))
        return found

    def _read_container(self, container: Container) -> dict[str, dict[str, Any]]:
        path = container.directory.path
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

    # -- containers -----------------------------------------------------------------------------

    async def _restore(self, container: Container, documents: dict[str, dict[str, Any]]) -> None:
        try:
            for where, document in sorted(documents.items(), key=lambda item: item[1]["created_at_ns"]):
                await self._restore_process(container, where, document)
        except (*_BROKEN, SupervisorError) as error:
            self._set_aside(container, error)
            return
        self._registry.oom.restore(container, self._events)
        setup.limit_again(container)
        if container.status not in (Status.DELETING, Status.CREATING):
            self._registry.oom.begin(container)
        changing = container.change is not None or change_call(container.ident) in self._calls
        if changing and container.checkpointing is None:  # else it is what the checkpoint began with
            self._pend(container.change.request if container.change is not None else None)
            self._later.append(finish_change(self._registry, container, self._freezes_told))
        if container.status is Status.DELETING:
            self._note(container, "a deletion goes on")
            self._end_what_has_ended(container)
            if container.delete_request is not None:
                # Its answer may be on disk already; it is true only when the deletion is through.
                self._registry.journal.begin(container.delete_request)
            self._pend(container.create_request)
            self._later.append(self._finish_delete(container, self._reopen(container.start_request)))
        elif container.status is Status.CREATING:
            self._pend(container.create_request)
            self._later.append(self._finish_create(container))
        elif container.status is Status.CREATED and start_call(container.ident) in self._calls:
            container.status = container.init.status = Status.CREATING
            known = self._reopen(container.start_request)
            self._pend(container.start_request)
            self._later.append(self._finish_start(container, known))
        elif container.checkpointing is not None:
            self._pend(mark(container.checkpointing["request"]))
            self._end_what_has_ended(container)
            self._later.append(self._checkpoints.resume(container))
        else:
            self._answered(container)
            self._end_what_has_ended(container)

    def _reopen(self, mark: RequestMark | None) -> RpcError | None:
        """The error a start is known to have ended with: its repeat gets that once the container is gone."""
        entry = self._registry.journal.find(mark.ident) if mark is not None else None
        if mark is None or entry is None or not isinstance(error := entry.future.result(), RpcError):
            return None
        self._registry.journal.begin(mark)
        return error

    def _pend(self, mark: RequestMark | None) -> None:
        """A request that was under way: its repeat waits for what becomes of it."""
        if mark is not None and self._registry.journal.find(mark.ident) is None:
            self._registry.journal.begin(mark)

    def _answer(self, mark: RequestMark | None, pid: int) -> None:
        """That request is known to have succeeded; its repeat is answered (``pid`` 0: it failed)."""
        if mark is None:
            return
        entry = self._registry.journal.find(mark.ident)
        if entry is None or not entry.future.done():
            self._registry.journal.finish(mark, Created(pid) if pid else UNDONE)

    def _answered(self, container: Container) -> None:
        """Requests whose outcome had been written down, and perhaps not that they had been answered."""
        init = container.processes.get(INIT)
        if container.status in (Status.RUNNING, Status.PAUSED) and init is not None:
            self._answer(container.start_request, init.pid)
            if container.change is None:
                freezing.after_restart(self._registry, container, self._freezes_told)
        if init is not None:
            self._answer(container.create_request, init.pid)
        for process in container.processes.values():
            if process.pid:
                self._answer(process.request, process.pid)

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
        self._closing[process.key] = document.get("closing_at", {})
        if where.startswith(".new-"):
            self._resume_exec(container, process)
            return
        process.pid = document["pid"] or int(where)
        process.status = Status.RUNNING if process.started_at_ns else Status.CREATED
        if process.key in self._alive:
            _, fds = await self._supervisor.request("pidfd", {"process": process.key})
            process.pidfd = fds[0]
        self._restore_streams(container, process)
        if document["exit"] is not None:
            process.restore_exit(from_wire(ExitRecord, document["exit"]))
            self._publish_once("process.exited", container, process, process.pid, document["exit"])

    def _restore_streams(self, container: Container, process: Process) -> None:
        held = self._held.pop(process.key, {})
        if process.stdio.terminal and "tty" not in process.slots:
            # Killed before the terminal's counters were written down: not a byte had been moved.
            process.slots["tty"] = [self._registry.keeper.counters.allocate() for _ in range(2)]
        process.streams = stdio.restore(
            self._registry.keeper,
            process.key,
            process.stdio,
            process.slots,
            held,
            lambda name, count: self._registry.stream_ended(container, process, name, count),
        )
        for name, offset in self._closing.pop(process.key, {}).items():
            process.stream(name).close_input(offset)
        for name, stream in process.streams.items():
            state = stream.state()
            if state.ended and name in process.slots:
                self._publish_once(
                    "stream.end", container, process, name, {"stream": name, "bytes": state.bytes}
                )

    def _publish_once(
        self, kind: str, container: Container, process: Process, mark: Any, data: dict[str, Any]
    ) -> None:
        """An event that may have been published, and may not, before the agent was killed."""
        if (kind, container.ident, process.ident, mark) not in self._told:
            self._note(container, f"{kind} had not been told", process=process.ident)
            self._registry.events.publish(kind, container.ident, process.ident, **data)

    def _end_what_has_ended(self, container: Container) -> None:
        """Ends, execs first, what ended while no agent was there; LOST is what nobody has seen end."""
        for process in sorted(container.processes.values(), key=lambda process: process.is_init):
            if process.exit is not None or process.status is Status.CREATING or process.pidfd >= 0:
                continue
            record = self._exits.get(process.key)
            if record is not None:
                self._note(container, "an exit came meanwhile", process=process.ident)
                self._registry.on_exit({"process": process.key, **record})
            else:
                self._note(container, "a process is gone without a trace", process=process.ident)
                self._lose(container, process)
        init = container.processes.get(INIT)
        if (
            init is not None
            and init.exit is not None
            and container.status in (Status.CREATED, Status.RUNNING, Status.PAUSED)
        ):
            container.status = Status.STOPPED
            if not of_this_life(container.ident, self._events, "container.stopped"):
                self._note(container, "its stop had not been told")
                self._registry.init_ended(container)
        elif container.status is Status.RUNNING and container.cgroup.is_frozen():
            self._note(container, "a signal to all of it had left it frozen")
            container.cgroup.unfreeze()

    def _lose(self, container: Container, process: Process) -> None:
        record = ExitRecord(255, 0, Reason.LOST, process.pid, process.started_at_ns, time.time_ns())
        process.restore_exit(record)
        self._publish_once(
            "process.exited",
            container,
            process,
            process.pid,
            {"exit_code": 255, "reason": "lost", "pid": process.pid},
        )

    # -- launches that were under way -------------------------------------------------------------

    def _resume_exec(self, container: Container, process: Process) -> None:
        process.status = Status.CREATING
        if not process.is_init:
            self._pend(process.request)
            self._later.append(self._finish_exec(container, process))

    async def _finish_create(self, container: Container) -> None:
        init = container.processes.get(INIT)
        outcome = None if init is None else await self._registry.caller.join(launch_call(init.key))
        if init is None or outcome is None or outcome.status != 0 or not outcome.pid:
            self._note(container, "a create that did not succeed is undone")
            end_launched(outcome)
            await self._undo(container)
            self._answer(container.create_request, 0)
            return
        self._note(container, "a create had succeeded")
        try:
            await self._take_up(container, init, outcome)
            setup.settle(container)
            if container.restored_from:
                restored(self._registry, container, init)
            else:
                self._lifecycle.created(container, init)
            self._answer(container.create_request, init.pid)
        except (*_BROKEN, RpcError, SupervisorError) as error:
            context(_log, container=container.ident).error("undone after all", extra={"error": str(error)})
            await self._undo(container)

    async def _finish_delete(self, container: Container, start_error: RpcError | None) -> None:
        init = container.processes.get(INIT)
        with contextlib.suppress(RpcError):
            await self._checkpoints.abandon(container)
        await self._undo(container)
        self._registry.caller.forget(start_call(container.ident))  # a start that failed may be why
        if container.start_request is not None and start_error is not None:
            self._registry.journal.finish(container.start_request, start_error)
        self._answer(container.create_request, 0)
        mark = container.delete_request
        if mark is not None:
            gone = container.ident not in self._registry.containers
            result = Deleted(init.exit if init is not None else None) if gone else UNDONE
            self._registry.journal.finish(mark, result)

    async def _finish_start(self, container: Container, known: RpcError | None) -> None:
        """``known`` is what the earlier agent had written down of its failure."""
        outcome = await self._registry.caller.join(start_call(container.ident))
        init = container.init
        waits = container.runtime.waits_for_start(container.ident)
        if outcome is not None and outcome.status == 0 and not waits:
            self._note(container, "a start had succeeded")
            self._lifecycle.started(container, init, time.time_ns())
            self._answer(container.start_request, init.pid)
        else:
            self._note(container, "a start that did not succeed is undone, with its container")
            failure = known or self._why_start_failed(container, outcome)
            await self._lifecycle.undo_start(container, failure)
            if container.start_request is not None:
                self._registry.journal.finish(container.start_request, failure)
            return
        self._end_what_has_ended(container)

    def _why_start_failed(self, container: Container, outcome: Outcome | None) -> RpcError:
        """What can be told without the runtime's words."""
        status, timed_out = (0, False) if outcome is None else (outcome.status, outcome.timed_out)
        problem = "it reported success, and the container waits for start" if status == 0 else ""
        failure = RuntimeFailure("start", status, problem, timed_out=timed_out)
        return to_rpc_error(self._lifecycle.explain_start(container, failure))

    async def _finish_exec(self, container: Container, process: Process) -> None:
        outcome = await self._registry.caller.join(launch_call(process.key))
        if outcome is None or outcome.status != 0 or not outcome.pid:
            self._note(container, "an exec that did not succeed is undone", process=process.ident)
            end_launched(outcome)
            self._drop_held(process.key)
            await self._lifecycle.undo_exec(container, process)
            self._answer(process.request, 0)
            return
        self._note(container, "an exec had succeeded", process=process.ident)
        try:
            await self._take_up(container, process, outcome)
            self._lifecycle.executed(container, process, process.created_at_ns)
            self._answer(process.request, process.pid)
        except (*_BROKEN, RpcError, SupervisorError) as error:
            context(_log, container=container.ident).error("undone after all", extra={"error": str(error)})
            await self._lifecycle.undo_exec(container, process)

    async def _take_up(self, container: Container, process: Process, outcome: Outcome) -> None:
        launched = Launched(outcome.pid, outcome.pidfd, outcome.exit or self._exits.get(process.key))
        if os.path.isdir(os.path.join(container.directory.path, f".new-{process.ident}")):
            self._registry.process_started(container, process, launched)
        else:  # it had been renamed already
            process.pid = launched.pid
            process.pidfd = launched.pidfd if launched.pidfd is not None else -1
        process.early_exit = launched.exit
        if not process.streams:
            self._restore_streams(container, process)

    async def _undo(self, container: Container) -> None:
        for process in container.processes.values():
            if process.key in self._alive and process.pidfd < 0:
                process.pid = self._alive[process.key]
            self._drop_held(process.key)  # what its launch had held, and nobody will take up
        await self._lifecycle.undo_create(container)

    # -- what belongs to nobody -------------------------------------------------------------------

    async def _drop_leftovers(self) -> None:
        known = {
            process.key
            for container in self._registry.containers.values()
            for process in container.processes.values()
        }
        for key in set(self._held) - known:
            _log.warning("descriptors of an unknown process are closed", extra={"fields": {"process": key}})
            self._drop_held(key)
        for key in set(self._exits) - known:
            self._supervisor.tell("forget_process", {"process": key})
        broken = {
            container.ident
            for container in self._registry.containers.values()
            if container.status is Status.FAILED
        }
        for key in set(self._alive) - known:
            if key.partition("/")[0] not in broken:
                await kill_unknown(self._supervisor, key)
        expected = {launch_call(key) for key in known} | {
            name(ident)
            for ident in self._registry.containers
            for name in (start_call, change_call, checkpoint_call)
        }
        for key in self._calls - expected:
            self._registry.spawn(self._drain_call(key))

    def _drop_held(self, key: str) -> None:
        for stream, fds in self._held.pop(key, {}).items():
            for suffix, fd in fds.items():
                os.close(fd)
                name = stdio.stream_name(key, stream)
                self._supervisor.release(f"{name}.{suffix}" if suffix else name)

    async def _drain_call(self, key: str) -> None:
        """A mount, an rm, a delete: it may finish; what it did is found by looking."""
        await self._registry.caller.join(key)
        self._registry.caller.forget(key)

    def _note(self, container: Container, what: str, process: str = "") -> None:
        context(_log, container=container.ident, process=process).info(what)


async def reload(registry: Registry, supervisor: SupervisorClient) -> None:
    """Restores what an earlier agent left. Exits that arrive meanwhile are taken up afterwards."""
    early: list[dict[str, Any]] = []
    supervisor.topics["exit"] = early.append
    await Reloader(registry, supervisor).run()
    supervisor.topics["exit"] = registry.on_exit
    for record in early:
        registry.on_exit(record)
    await asyncio.sleep(0)  # let what was put in the background begin before anybody is served
