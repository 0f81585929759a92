"""What an earlier agent was killed over: waited for, and then done or undone as a whole.

A launch, a start or a deletion goes on without the agent that asked for it, the supervisor keeping what it
came to; requests are answered from that, and their repeats with them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time

from gcsagent.agent import changes, freezing, limits
from gcsagent.agent.calls import Outcome, end_launched
from gcsagent.agent.checkpoint import CheckpointService
from gcsagent.agent.container import Container
from gcsagent.agent.estate import Estate
from gcsagent.agent.failures import to_rpc_error
from gcsagent.agent.found import BROKEN
from gcsagent.agent.journal import UNDONE, RequestMark
from gcsagent.agent.lifecycle import Lifecycle
from gcsagent.agent.logs import context
from gcsagent.agent.pods import setup
from gcsagent.agent.process import Process
from gcsagent.agent.registry import Registry
from gcsagent.agent.restoring import restored
from gcsagent.agent.runtime import Launched, RuntimeFailure, change_call, launch_call, start_call
from gcsagent.agent.supervisor_client import SupervisorError
from protocol.checks import INIT
from protocol.errors import RpcError
from protocol.families.container import Created, Deleted
from protocol.method import Empty
from protocol.types import Status

_log = logging.getLogger("agent.finishing")


class Finisher:
    def __init__(self, registry: Registry, estate: Estate, checkpoints: CheckpointService) -> None:
        self._registry, self._estate, self._checkpoints = registry, estate, checkpoints
        self._lifecycle = Lifecycle(registry)

    def reopen(self, mark: RequestMark | None) -> RpcError | None:
        """The error a start is known to have ended with: its repeat gets that once the container is gone."""
        entry = self._registry.journal.find(mark.ident) if mark is not None else None
        if mark is None or entry is None or not isinstance(error := entry.future.result(), RpcError):
            return None
        self._registry.journal.begin(mark)
        return error

    def pend(self, mark: RequestMark | None) -> None:
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

    def answered(self, container: Container) -> None:
        """Requests whose outcome had been written down, and perhaps not that they had been answered."""
        init = container.processes.get(INIT)
        if container.status in (Status.RUNNING, Status.PAUSED) and init is not None:
            self._answer(container.start_request, init.pid)
            if container.change is None:
                freezing.after_restart(self._registry, container, self._estate.freezes_told)
        if init is not None:
            self._answer(container.create_request, init.pid)
        for process in container.processes.values():
            if process.pid:
                self._answer(process.request, process.pid)

    async def create(self, container: Container) -> None:
        init = container.processes.get(INIT)
        outcome = None if init is None else await self._registry.caller.join(launch_call(init.key))
        if init is None or outcome is None or outcome.status != 0 or not outcome.pid:
            self._estate.note(container, "a create that did not succeed is undone")
            end_launched(outcome)
            await self._undo(container)
            self._answer(container.create_request, 0)
            return
        self._estate.note(container, "a create had succeeded")
        try:
            await self._take_up(container, init, outcome)
            setup.settle(container)
            if container.restored_from:
                restored(self._registry, container, init)
            else:
                self._lifecycle.created(container, init)
            self._answer(container.create_request, init.pid)
        except (*BROKEN, RpcError, SupervisorError) as error:
            context(_log, container=container.ident).error("undone after all", extra={"error": str(error)})
            await self._undo(container)

    async def delete(self, container: Container, start_error: RpcError | None) -> None:
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

    async def start(self, container: Container, known: RpcError | None) -> None:
        """``known`` is what the earlier agent had written down of its failure."""
        outcome = await self._registry.caller.join(start_call(container.ident))
        init = container.init
        waits = container.runtime.waits_for_start(container.ident)
        if outcome is not None and outcome.status == 0 and not waits:
            self._estate.note(container, "a start had succeeded")
            self._lifecycle.started(container, init, time.time_ns())
            self._answer(container.start_request, init.pid)
        else:
            self._estate.note(container, "a start that did not succeed is undone, with its container")
            failure = known or self._why_start_failed(container, outcome)
            await self._lifecycle.undo_start(container, failure)
            if container.start_request is not None:
                self._registry.journal.finish(container.start_request, failure)
            return
        self._estate.end_what_has_ended(container)

    def _why_start_failed(self, container: Container, outcome: Outcome | None) -> RpcError:
        """What can be told without the runtime's words."""
        status, timed_out = (0, False) if outcome is None else (outcome.status, outcome.timed_out)
        problem = "it reported success, and the container waits for start" if status == 0 else ""
        failure = RuntimeFailure("start", status, problem, timed_out=timed_out)
        return to_rpc_error(self._lifecycle.explain_start(container, failure))

    async def exec(self, container: Container, process: Process) -> None:
        outcome = await self._registry.caller.join(launch_call(process.key))
        if outcome is None or outcome.status != 0 or not outcome.pid:
            self._estate.note(container, "an exec that did not succeed is undone", process=process.ident)
            end_launched(outcome)
            self._estate.drop_held(process.key)
            await self._lifecycle.undo_exec(container, process)
            self._answer(process.request, 0)
            return
        self._estate.note(container, "an exec had succeeded", process=process.ident)
        try:
            await self._take_up(container, process, outcome)
            self._lifecycle.executed(container, process, process.created_at_ns)
            self._answer(process.request, process.pid)
        except (*BROKEN, RpcError, SupervisorError) as error:
            context(_log, container=container.ident).error("undone after all", extra={"error": str(error)})
            await self._lifecycle.undo_exec(container, process)

    async def _take_up(self, container: Container, process: Process, outcome: Outcome) -> None:
        launched = Launched(outcome.pid, outcome.pidfd, outcome.exit or self._estate.exits.get(process.key))
        if os.path.isdir(os.path.join(container.directory.path, f".new-{process.ident}")):
            self._registry.process_started(container, process, launched)
        else:  # it had been renamed already
            process.pid = launched.pid
            process.pidfd = launched.pidfd if launched.pidfd is not None else -1
        # Its end may have been told right behind the answer, before this went on.
        process.early_exit = launched.exit or process.early_exit
        if not process.streams:
            if process.stdio.terminal:
                await self._estate.take_terminal(process)
            self._estate.restore_streams(container, process)

    async def _undo(self, container: Container) -> None:
        for process in container.processes.values():
            if process.key in self._estate.alive and process.pidfd < 0:
                process.pid = self._estate.alive[process.key]
            self._estate.drop_held(process.key)  # what its launch had held, and nobody will take up
        await self._lifecycle.undo_create(container)

    async def change(self, container: Container) -> None:
        """A pause, resume or update: nothing else is done to the container before its call has ended."""
        registry, change = self._registry, container.change
        async with container.changing:
            outcome = await registry.caller.join(change_call(container.ident))
            done = False
            if change is not None:
                settle = limits.settle if change.kind == limits.UPDATE else freezing.settle
                done = settle(container, change, outcome)
                context(_log, container=container.ident).info(
                    f"{change.kind} had {'' if done else 'not '}succeeded"
                )
            changes.end(registry, container)
            if container.status in (Status.RUNNING, Status.PAUSED):
                freezing.after_restart(registry, container, self._estate.freezes_told)
        if change is not None and change.request is not None:
            registry.journal.finish(change.request, Empty() if done else UNDONE)
