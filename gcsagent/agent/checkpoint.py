"""container.checkpoint: writes a container's processes, and what they need to go on, to files.

    frozen      by a pause, unless it is paused already: from here on nothing changes
    prepared    the directory under its temporary name; the upper layer of an overlay
    dumped      runc checkpoint, which is CRIU: from here on the processes have ended, or run on
    whole       streams and checkpoint.json are written, and the directory gets its name

What is under way is in container.json (``checkpointing``) from the first step on: an agent that finds it
there joins the runtime's call and goes on from what became of it. A dump is never cut off by a deadline: CRIU
works inside the processes, and would leave them damaged.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import time
from typing import Any

from gcsagent.agent import criu, limit_files, stream_images
from gcsagent.agent.call import Call
from gcsagent.agent.checkpoints_dir import CheckpointDir, CheckpointStore, Saved
from gcsagent.agent.container import Container
from gcsagent.agent.journal import UNDONE, RequestMark
from gcsagent.agent.logs import context
from gcsagent.agent.overlay import lower_of
from gcsagent.agent.pods.pod import ALONE
from gcsagent.agent.process_dir import write_json
from gcsagent.agent.registry import Registry
from gcsagent.agent.runtime import CriuOptions, RuntimeFailure, change_call, checkpoint_call
from gcsagent.agent.undoing import Held, bounded
from protocol.checks import INIT
from protocol.errors import Code, RpcError
from protocol.families.checkpoint import Checkpoint, CheckpointList, CheckpointRef, MakeCheckpoint
from protocol.method import Empty
from protocol.schema import from_wire, to_wire
from protocol.types import Status

DUMP_SECONDS = 600.0
"""When a dump that hangs is given up after all."""

END_SECONDS = 30.0
"""How long processes that have been saved may take to be gone."""

_log = logging.getLogger("agent.checkpoint")


class CheckpointService:
    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._store = CheckpointStore(registry.state)

    def list_all(self, _params: Empty, _call: Call) -> CheckpointList:
        return CheckpointList(tuple(self._store.all()))

    async def delete(self, params: CheckpointRef, call: Call) -> Empty:
        found = self._store.find(params.checkpoint, remains=True)
        for container in self._registry.containers.values():
            if container.status is Status.CREATING and container.restored_from == os.path.realpath(
                found.path
            ):
                raise RpcError(
                    Code.FAILED_PRECONDITION, f"container {container.ident} is being restored from it"
                )
        call.commit()
        journal = self._registry.journal
        await self._store.delete(self._registry.caller, journal, params.checkpoint, call.mark)
        return Empty()

    async def checkpoint(self, params: MakeCheckpoint, call: Call) -> Checkpoint:
        container = self._registry.get(params.container)
        async with Held(container.changing) as held:
            container.check("checkpoint")
            _check_pod(container)
            _check_processes(container)
            criu.require("criu", *(["tar"] if _has_overlay(container) else []))
            plan = await self._plan(container, params, call)
            try:
                await self._save(container, plan, call)
                about = await self._complete(container, plan)
            except BaseException:
                await bounded(self._undo(container, plan), held)
                raise
        self._registry.check_auto_delete(container, container.init)
        return about

    async def _plan(self, container: Container, params: MakeCheckpoint, call: Call) -> dict[str, Any]:
        """What an agent needs to go on with it. Raises RpcError for what cannot be.

        Between looking whether the name is free and the container's saying that it has it nothing is waited
        for: so what has to be asked is asked first.
        """
        runtime_version = await container.runtime.version()
        criu_version = await criu.version(self._registry.caller)
        places = self._store.plan(params.checkpoint, params.path)
        self._check_not_under_way(params.checkpoint, places["temporary"])
        about = Checkpoint(
            params.checkpoint,
            container.ident,
            places["final"],
            time.time_ns(),
            0,
            params.leave_running,
            params.tcp_established,
            params.ext_unix_sk,
            params.shell_job,
            params.file_locks,
            _has_overlay(container),
            container.runtime.name,
            runtime_version,
            criu_version,
        )
        return {
            **places,
            "about": to_wire(about),
            "paused": container.status is Status.PAUSED,
            "request": call.mark,
            "known": {},
        }

    def _check_not_under_way(self, checkpoint: str, temporary: str) -> None:
        """Raises ALREADY_EXISTS for one that has that id, or is to be in that place."""
        for other in self._registry.containers.values():
            plan = other.checkpointing
            if plan is not None and (
                plan["about"]["checkpoint"] == checkpoint
                or os.path.realpath(plan["temporary"]) == os.path.realpath(temporary)
            ):
                raise RpcError(
                    Code.ALREADY_EXISTS,
                    f"checkpoint {plan['about']['checkpoint']} is being made at {plan['final']}",
                )

    # -- the steps ------------------------------------------------------------------------------

    async def _save(self, container: Container, plan: dict[str, Any], call: Call) -> None:
        container.check("checkpoint")  # while versions were asked for it may have ended, or got a process
        _check_processes(container)
        container.status, container.checkpointing = Status.PAUSED, plan
        container.save()
        if not plan["paused"]:
            await container.runtime.pause(container.ident, call.timeout)
            self._registry.caller.forget(change_call(container.ident))
        plan["known"] = stream_images.before(container.init)
        plan["limits"] = limit_files.snapshot(container.cgroup, limit_files.FILES)
        container.save()
        directory = CheckpointDir(plan["temporary"])
        await self._store.discard(self._registry.caller, plan)
        directory.create()
        write_json(os.path.join(directory.path, "config.json"), container.directory.read("config.json"))
        if plan["about"]["overlay"]:
            upper = os.path.join(container.directory.path, "upper")
            tar = ["tar", "--create", "--file", directory.upper, "--directory", upper, *TAR_OPTIONS, "."]
            await criu.run(self._registry.caller, tar, call.timeout)
        call.commit()
        await self._dump(container, plan, directory)

    async def _dump(self, container: Container, plan: dict[str, Any], directory: CheckpointDir) -> None:
        about, work = plan["about"], os.path.join(directory.path, "work")
        os.mkdir(work, mode=0o700)
        options = criu_options(from_wire(Checkpoint, about), directory, work)
        try:
            await container.runtime.checkpoint(
                container.ident, options, DUMP_SECONDS, leave_running=about["leave_running"]
            )
        except RuntimeFailure as failure:
            log = os.path.join(work, "dump.log")
            raise criu.explain(failure, f"save container {container.ident}", log) from failure

    async def _complete(self, container: Container, plan: dict[str, Any]) -> Checkpoint:
        """The runtime has saved it. Raises OSError or RpcError, with nothing of the checkpoint published."""
        directory, alive = CheckpointDir(plan["temporary"]), bool(plan["about"]["leave_running"])
        if not alive:
            async with asyncio.timeout(END_SECONDS):
                await container.init.wait()
        if not os.path.exists(plan["final"]):
            about = await self._write(container, plan, directory, alive)
            self._store.publish(plan)
        else:  # an agent was killed right here
            self._store.publish(plan)
            about = CheckpointDir(plan["final"]).read()[0]
        mark = plan["request"]
        self._registry.journal.record(None if mark is None else RequestMark(*mark), about)
        await self._go_on(container, plan)
        self._registry.events.publish(
            "container.checkpointed",
            container.ident,
            INIT,
            checkpoint=about.checkpoint,
            leave_running=about.leave_running,
        )
        return about

    async def _write(
        self, container: Container, plan: dict[str, Any], directory: CheckpointDir, alive: bool
    ) -> Checkpoint:
        """The documents, and what is moved last because the old streams lose it."""
        process = container.init
        if directory.whole:  # an agent was killed right here
            about, saved = directory.read()
            stream_images.take(process, directory, saved.streams)
            return about
        shutil.rmtree(os.path.join(directory.path, "work"), ignore_errors=True)
        images = await stream_images.save(process, directory, plan["known"], alive)
        kept = sum(image.get("kept", 0) for image in images.values())
        about = from_wire(
            Checkpoint,
            {
                **plan["about"],
                "size_bytes": directory.size() + kept,
                "streams": stream_images.offsets(images),
            },
        )
        saved = Saved(
            process.args,
            process.stdio,
            container.labels,
            container.auto_delete,
            container.owns_pids,
            self._registry.cgroup_tree.name_of(container.cgroup),
            lower_of(container.directory) if plan["about"]["overlay"] else "",
            plan["limits"],
            container.io_limits,
            images,
        )
        directory.write(about, saved)
        if not alive:
            stream_images.take(process, directory, images)
        return about

    async def _go_on(self, container: Container, plan: dict[str, Any]) -> None:
        """The container is what the caller wanted it to be, and nothing is under way any more."""
        container.checkpointing = None
        if container.status is Status.PAUSED and not plan["paused"]:
            container.cgroup.thaw()
            container.status = Status.RUNNING
        container.save()
        self._registry.caller.forget(checkpoint_call(container.ident))

    async def _undo(self, container: Container, plan: dict[str, Any]) -> None:
        """Nothing of it is left, and the container goes on as if nothing had been asked."""
        try:
            await self._store.discard(self._registry.caller, plan)
        except RpcError as error:
            context(_log, container=container.ident).error(
                "a checkpoint left something behind", extra={"error": str(error)}
            )
        await self._go_on(container, plan)

    # -- after a restart of the agent ---------------------------------------------------------------

    async def resume(self, container: Container) -> None:
        """Goes on with what an earlier agent was killed over. Its request is pending in the journal."""
        plan = container.checkpointing
        assert plan is not None
        log, result = context(_log, container=container.ident), UNDONE
        async with container.changing:
            for call in (change_call, checkpoint_call):  # the pause, then the dump
                outcome = await self._registry.caller.join(call(container.ident))
            self._registry.caller.forget(change_call(container.ident))
            made = os.path.exists(plan["final"]) or (outcome is not None and outcome.status == 0)
            try:
                if made:
                    log.info("a checkpoint had succeeded")
                    result = await self._complete(container, plan)
                else:
                    log.info("a checkpoint that did not succeed is undone")
                    await self._undo(container, plan)
            except (OSError, RpcError, TimeoutError, ValueError) as error:
                log.error("a checkpoint is undone after all", extra={"error": str(error)})
                await self._undo(container, plan)
        if plan["request"] is not None:
            self._registry.journal.finish(RequestMark(*plan["request"]), result)
        self._registry.check_auto_delete(container, container.init)

    async def abandon(self, container: Container) -> None:
        """The container an earlier agent was saving is to be deleted. Raises RpcError."""
        if container.checkpointing is not None:
            await self._store.discard(self._registry.caller, container.checkpointing)

    def pend_deletions(self) -> None:
        """Requests to delete that an earlier agent was killed over: their repeats wait for :meth:`sweep`."""
        for mark in self._store.deletions():
            if self._registry.journal.find(mark.ident) is None:
                self._registry.journal.begin(mark)

    async def sweep(self) -> None:
        """Raises RpcError."""
        deletions = self._store.deletions()
        plans = (container.checkpointing for container in self._registry.containers.values())
        under_way = {plan[name] for plan in plans if plan is not None for name in ("temporary", "link")}
        await self._store.sweep(self._registry.caller, under_way)
        for mark in deletions:
            self._registry.journal.finish(mark, Empty())


TAR_OPTIONS = ("--xattrs", "--xattrs-include=*", "--acls", "--sparse", "--numeric-owner")
"""GNU tar: whiteouts are device files, opaque directories have an attribute of overlayfs's."""


def criu_options(about: Checkpoint, directory: CheckpointDir, work: str) -> CriuOptions:
    return CriuOptions(
        directory.images,
        work,
        tcp_established=about.tcp_established,
        ext_unix_sk=about.ext_unix_sk,
        shell_job=about.shell_job,
        file_locks=about.file_locks,
    )


def _has_overlay(container: Container) -> bool:
    return os.path.ismount(os.path.join(container.directory.path, "root"))


def _check_pod(container: Container) -> None:
    if container.role is not ALONE:
        raise RpcError(
            Code.FAILED_PRECONDITION,
            f"container {container.ident} is of a pod: what it shares cannot be saved with it alone",
        )


def _check_processes(container: Container) -> None:
    """Raises FAILED_PRECONDITION for what could not be told or connected again after a restore."""
    execs = [process.ident for process in container.execs if process.exit is None]
    if execs:
        raise RpcError(
            Code.FAILED_PRECONDITION,
            f"processes that were executed in container {container.ident} still run: {', '.join(execs)};"
            " they would be restored as strangers: let them end, or kill them",
            processes=execs,
        )
    if container.init.fifos:
        raise RpcError(
            Code.FAILED_PRECONDITION,
            f"container {container.ident} has named pipes for its stdio, which are the guest's and cannot be"
            " saved with it",
            streams=sorted(container.init.fifos),
        )
