"""container.create, start, wait, delete, and process.exec: what starts and ends things."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import os
import time
from typing import Any

from gcsagent.agent import bundle, fifos, overlay, sidecar, stdio
from gcsagent.agent.attachable import Attachable
from gcsagent.agent.call import Call
from gcsagent.agent.container import Container
from gcsagent.agent.failures import explain_launch, to_rpc_error
from gcsagent.agent.logs import context
from gcsagent.agent.oci import cgroup_path
from gcsagent.agent.oci.check_namespaces import mapped_root
from gcsagent.agent.oci.owners import give_pipes
from gcsagent.agent.pods import ending, setup
from gcsagent.agent.process import Process
from gcsagent.agent.registry import DELETE_SECONDS, Registry
from gcsagent.agent.runtime import Launched, RuntimeFailure, launch_call, start_call
from gcsagent.agent.strays import kill_strays
from gcsagent.agent.turns import ASKED_BY
from gcsagent.agent.undoing import bounded
from gcsagent.common.files import write_new
from protocol.checks import INIT
from protocol.errors import Code, RpcError
from protocol.families.container import (
    ContainerRef,
    CreateContainer,
    Created,
    DeleteContainer,
    Deleted,
)
from protocol.families.process import Exec
from protocol.types import ExitRecord, Status

UNDO_SECONDS = 10.0
"""How long the runtime may take to delete what it has just failed to make: within CLEANUP_SECONDS."""

_log = logging.getLogger("agent.lifecycle")


class Lifecycle:
    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    # -- create ---------------------------------------------------------------------------------

    async def create(self, params: CreateContainer, call: Call) -> Created:
        stdio.check(params.stdio)
        role = setup.plan(self._registry, params)
        spec = bundle.load(params, functools.partial(setup.adapt, self._registry, role))
        piping = sidecar.plan(spec, params.stdio, self._registry.pipes)
        runtime = self._registry.runtimes.choose(params.runtime)
        container = self._registry.new(
            params.container,
            runtime,
            params.auto_delete,
            params.labels,
            cgroup_path.wanted(spec),
            params.stdio,
            role,
        )
        container.create_request = call.mark
        self.make_directory(container)
        try:
            process = await self._make(container, params, spec, piping, call)
        except BaseException as error:
            failure = failure_of(error, call)
            await bounded(self.undo_create(container, failure))
            raise
        call.commit()
        self.created(container, process)
        return Created(process.pid)

    def created(self, container: Container, process: Process) -> None:
        """The runtime has made it: that is written down, told, and no longer the supervisor's to remember."""
        container.status = process.status = Status.CREATED
        container.directory.update(process.pid, process.document())
        container.save()
        self._registry.caller.forget(launch_call(process.key))
        self._registry.events.publish("container.created", container.ident, INIT, pid=process.pid)
        self._registry.oom.begin(container)
        self._registry.take_early_exit(container, process)

    async def _make(
        self,
        container: Container,
        params: CreateContainer,
        spec: dict[str, Any],
        piping: sidecar.Piping,
        call: Call,
    ) -> Process:
        registry = self._registry
        args, env, cwd = (
            tuple(spec["process"]["args"]),
            spec["process"].get("env", []),
            spec["process"]["cwd"],
        )
        process = Process(container.ident, INIT, args, piping.stdio, False)
        process.fifos |= piping.inherited
        container.processes[INIT] = process
        container.root, container.owns_pids = spec["root"]["path"], bundle.owns_pid_namespace(spec)
        container.save()
        if params.overlay:
            spec["root"]["path"] = await overlay.mount(
                registry.caller, container.directory, spec["root"]["path"], mapped_root(spec)
            )
            container.root = spec["root"]["path"]
            container.save()
        await setup.prepare(registry, container, spec)
        container.directory.write("config.json", bundle.finish(spec, params.stdio, container.cgroup.path))
        prepared = self.prepare(container, process, spec)
        try:
            directory = container.directory.begin(INIT, process.document())
            fifos.open_all(
                registry.containers, process, prepared, directory, mapped_root(spec), piping.fields
            )
            launch = prepared.launch(os.path.join(directory, "pid"))
            launched = await container.runtime.create(
                container.ident, container.directory.path, launch, call.timeout
            )
        except RuntimeFailure as failure:
            failure.stderr = failure.stderr or prepared.said()
            error = explain_launch(failure, container.root, args, env, cwd)
            raise setup.explain(registry, container, error) from failure
        finally:
            prepared.close_child()
        await self.take_up(container, process, prepared, launched)
        setup.settle(container)
        return process

    async def take_up(
        self, container: Container, process: Process, prepared: stdio.PreparedStdio, launched: Launched
    ) -> None:
        """Makes a process that the runtime has just launched one of ours."""
        self._registry.process_started(container, process, launched)
        process.early_exit = launched.exit or process.early_exit
        await self._take_terminal(container, process, prepared)
        for stream in prepared.streams.values():
            if isinstance(stream, Attachable):
                stream.begin()

    def make_directory(self, container: Container) -> None:
        """Raises FAILED_PRECONDITION, or what the disk says, with nothing made."""
        try:
            container.directory.create()
        except OSError as error:
            self._registry.containers.pop(container.ident, None)
            if not isinstance(error, FileExistsError):
                raise
            raise RpcError(
                Code.FAILED_PRECONDITION,
                f"{container.directory.path} is in the way, left by an earlier agent: remove it first",
            ) from error

    async def undo_create(self, container: Container, failure: RpcError | None = None) -> None:
        """Leaves nothing of a container that could not be made or started.

        What resists stays visible as a FAILED container, and ``failure`` tells of it.
        """
        init = container.processes.get(INIT)
        if init is not None:
            self._release_terminal(init)
        try:
            await self._registry.delete(container, UNDO_SECONDS)
        except RpcError as error:
            context(_log, container=container.ident).error(
                "something is left behind", extra={"error": str(error)}
            )
            if failure is not None:
                failure.details["problem"] = container.problem
        self._registry.caller.forget(launch_call(f"{container.ident}/{INIT}"))

    def prepare(self, container: Container, process: Process, spec: dict[str, Any]) -> stdio.PreparedStdio:
        """``spec`` is the container's: its root's are the pipes."""
        prepared = stdio.prepare(
            self._registry.keeper,
            process.key,
            process.stdio,
            container.directory.path,
            lambda name, count: self._registry.stream_ended(container, process, name, count),
        )
        process.streams, process.slots = prepared.streams, prepared.slots
        for stream in prepared.streams.values():
            if isinstance(stream, Attachable):
                stream.hold_back()
        give_pipes(prepared.child, mapped_root(spec))
        return prepared

    async def _take_terminal(
        self, container: Container, process: Process, prepared: stdio.PreparedStdio
    ) -> None:
        if process.stdio.terminal:
            await stdio.take_terminal(
                prepared,
                self._registry.keeper,
                lambda name, count: self._registry.stream_ended(container, process, name, count),
            )

    # -- start, wait, kill, delete --------------------------------------------------------------

    async def start(self, params: ContainerRef, call: Call) -> Created:
        container = self._registry.get(params.container)
        container.check("start")
        container.start_request = call.mark
        container.save()
        container.status = Status.CREATING  # nobody else may start, exec or delete it meanwhile
        started_at_ns = time.time_ns()
        process = container.init
        process.status = Status.CREATING
        try:
            await container.runtime.start(container.ident, call.timeout)
        except BaseException as error:
            explained = self.explain_start(container, error)
            await bounded(self.undo_start(container, failure_of(explained, call)))
            if explained is error:
                raise
            raise explained from error
        call.commit()
        self.started(container, process, started_at_ns)
        return Created(process.pid)

    def started(self, container: Container, process: Process, started_at_ns: int) -> None:
        container.status = Status.RUNNING
        container.save()
        self._registry.running(container, process, started_at_ns)
        self._registry.caller.forget(start_call(container.ident))

    def explain_start(self, container: Container, error: BaseException) -> BaseException:
        """``error``, or what is behind it when the runtime has failed."""
        if not isinstance(error, RuntimeFailure):
            return error
        try:
            spec = container.directory.read("config.json")["process"]
            env, cwd = spec.get("env", []), spec["cwd"]
        except (OSError, ValueError, KeyError, TypeError):
            return error
        return explain_launch(error, container.root, container.init.args, env, cwd)

    async def undo_start(self, container: Container, failure: RpcError) -> None:
        """Nothing remains of a container whose start failed: it could not be started again.

        That changes what a repeat of the request would find, so its answer is kept, as a success is.
        """
        self._registry.journal.record(container.start_request, failure)
        container.init.status = Status.CREATED  # its end is told as that of any process
        self._registry.take_early_exit(container, container.init)
        await self.undo_create(container, failure)
        self._registry.caller.forget(start_call(container.ident))

    async def wait(self, params: ContainerRef, _call: Call) -> ExitRecord:
        """Every exec that exists when init ends is waited for first; then init's own record is the answer."""
        container = self._registry.get(params.container)
        init = container.process(INIT)
        record = await init.wait()
        for process in container.execs:
            if process.alive:
                await process.wait()
        if container.sweep is not None:
            await asyncio.shield(container.sweep)
        return record

    async def delete(self, params: DeleteContainer, call: Call) -> Deleted:
        container = self._registry.get(params.container)
        init = container.processes.get(INIT)
        ending.check(self._registry.containers.values(), container, force=params.force)
        container.check("force the deletion of" if params.force else "delete")
        if container.status is not Status.DELETING:  # else somebody has begun: one deletion is enough
            container.delete_request = call.mark
        call.commit()
        await self._registry.delete(container, min(DELETE_SECONDS, call.timeout), ASKED_BY.get())
        return Deleted(init.exit if init is not None else None)

    # -- exec -----------------------------------------------------------------------------------

    async def exec(self, params: Exec, call: Call) -> Created:
        stdio.check(params.stdio)
        container = self._registry.get(params.container)
        container.check("exec in")
        if params.process in container.processes:
            raise RpcError(
                Code.ALREADY_EXISTS, f"container {container.ident} has a process {params.process} already"
            )
        self._registry.bounds.check_exec(params.stdio, container, self._registry.containers.values())
        config = container.directory.read("config.json")
        spec = bundle.for_exec(config, params, _root_of(container))
        container.init.signal(0)  # it lives, so that the root looked into was its
        process = Process(
            container.ident, params.process, tuple(spec["args"]), params.stdio, params.auto_delete
        )
        process.request = call.mark
        container.processes[process.ident] = process
        started_at_ns = time.time_ns()
        try:
            await self._launch_exec(container, process, config, spec, call)
        except BaseException:
            await bounded(self.undo_exec(container, process))
            raise
        call.commit()
        self.executed(container, process, started_at_ns)
        return Created(process.pid)

    def executed(self, container: Container, process: Process, started_at_ns: int) -> None:
        self._registry.running(container, process, started_at_ns)
        self._registry.caller.forget(launch_call(process.key))

    async def _launch_exec(
        self,
        container: Container,
        process: Process,
        config: dict[str, Any],
        spec: dict[str, Any],
        call: Call,
    ) -> None:
        prepared = self.prepare(container, process, config)
        try:
            directory = container.directory.begin(process.ident, process.document())
            process_file = os.path.join(directory, "spec.json")
            write_new(process_file, json.dumps(spec).encode("ascii"))
            fifos.open_all(self._registry.containers, process, prepared, directory, mapped_root(config))
            launch = prepared.launch(os.path.join(directory, "pid"))
            launched = await container.runtime.exec(container.ident, process_file, launch, call.timeout)
        except RuntimeFailure as failure:
            failure.stderr = failure.stderr or prepared.said()
            raise explain_launch(
                failure, _root_of(container), process.args, spec["env"], spec["cwd"]
            ) from failure
        finally:
            prepared.close_child()
        await self.take_up(container, process, prepared, launched)

    async def undo_exec(self, container: Container, process: Process) -> None:
        if process.pid and process.early_exit is None:
            process.kill()
        kill_strays(container, process)
        self._release_terminal(process)
        self._registry.forget_process(container, process)
        self._registry.caller.forget(launch_call(process.key))

    def _release_terminal(self, process: Process) -> None:
        """A launch cut off after the runtime sent the terminal and before it became a stream of ours."""
        if process.stdio.terminal:
            self._registry.keeper.supervisor.release(stdio.stream_name(process.key, "tty"))


def _root_of(container: Container) -> str:
    """Its root directory with everything mounted there, as long as it lives."""
    return f"/proc/{container.init.pid}/root" if container.init.alive else container.root


def failure_of(error: BaseException, call: Call) -> RpcError:
    """What the caller is going to be told."""
    if isinstance(error, asyncio.CancelledError):
        return call.aborted or RpcError(Code.CANCELLED, f"{call.method} was given up")
    return to_rpc_error(error)
