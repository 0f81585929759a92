"""container.restore: a new container out of a checkpoint, its processes going on where they were saved.

It is made as a create makes one, from what the checkpoint has kept: the spec, the upper layer of an overlay,
labels, stdio. What differs is the runtime's command, and that there is nothing to start.
"""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
import time
from typing import Any

from gcsagent.agent import bundle, criu, io_limits, limit_files, overlay, stream_images
from gcsagent.agent.call import Call
from gcsagent.agent.checkpoint import TAR_OPTIONS, criu_options
from gcsagent.agent.checkpoints_dir import CheckpointDir, CheckpointStore, Saved
from gcsagent.agent.container import Container
from gcsagent.agent.lifecycle import Lifecycle, failure_of
from gcsagent.agent.oci.check_namespaces import mapped_root
from gcsagent.agent.process import Process
from gcsagent.agent.registry import Registry
from gcsagent.agent.runtime import RuntimeFailure, launch_call
from gcsagent.agent.stdio import PreparedStdio
from gcsagent.agent.streams import InputStream
from gcsagent.agent.undoing import bounded
from protocol.checks import INIT
from protocol.dataclass import replace
from protocol.errors import Code, RpcError
from protocol.families.checkpoint import Checkpoint, Restore
from protocol.families.container import Created
from protocol.types import Status, Stdio, Winsize

CRIU_CONFIG = "org.criu.config"
"""The annotation by which runc (docs/checkpoint-restore.md) and crun name a file of CRIU's options."""

CRIU_OPTIONS = "manage-cgroups=ignore\n"
"""Processes stay in the cgroup the runtime starts CRIU in, the new container's. Else they would be put into
that of the container that was saved."""

LOOPBACK_UP = r"""read -r state; pid=${state#*\"pid\":}; pid=${pid%%[,\}]*}
if command -v nsenter >/dev/null; then nsenter -t "$pid" -n ip link set lo up
else busybox nsenter -t "$pid" -n busybox ip link set lo up; fi || :"""
"""A hook. runc has a new network namespace restored empty, with lo down, where connections could not be
restored; it runs createRuntime's hooks just before CRIU fills it."""


class RestoreService:
    def __init__(self, registry: Registry, lifecycle: Lifecycle) -> None:
        self._registry, self._lifecycle = registry, lifecycle
        self._store = CheckpointStore(registry.state)

    async def restore(self, params: Restore, call: Call) -> Created:
        source = self._source(params)
        about, saved = source.read()
        criu.require("criu", *(["tar"] if about.overlay else []))
        ident = params.container or about.container
        container = self._registry.new(
            ident,
            self._registry.runtimes.choose(about.runtime),
            saved.auto_delete if params.auto_delete is None else params.auto_delete,
            saved.labels if params.labels is None else params.labels,
            saved.cgroup if ident == about.container else "",
            saved.stdio,
        )
        container.create_request, container.restored_from = call.mark, os.path.realpath(source.path)
        self._lifecycle.make_directory(container)
        try:
            process = await self._make(container, source, call)
        except (OSError, ValueError, KeyError, TypeError) as error:
            unusable = RpcError(Code.FAILED_PRECONDITION, f"checkpoint {source.path} cannot be used: {error}")
            await bounded(self._lifecycle.undo_create(container, unusable))
            raise unusable from error
        except BaseException as error:
            await bounded(self._lifecycle.undo_create(container, failure_of(error, call)))
            raise
        call.commit()
        restored(self._registry, container, process)
        return Created(process.pid)

    def _source(self, params: Restore) -> CheckpointDir:
        if (params.checkpoint is None) == (params.path is None):
            raise RpcError(
                Code.INVALID_ARGUMENT, "give exactly one of 'checkpoint' and 'path'", field="checkpoint"
            )
        if params.checkpoint is not None:
            return self._store.find(params.checkpoint)
        assert params.path is not None
        return CheckpointDir(params.path)

    async def _make(self, container: Container, source: CheckpointDir, call: Call) -> Process:
        about, saved = source.read()
        images, spec = saved.streams, source.spec()
        stdio = _with_size(saved.stdio, images)
        process = Process(container.ident, INIT, saved.args, stdio, False)
        container.processes[INIT], container.owns_pids = process, saved.owns_pids
        container.root = await self._root(container, about, saved, spec, source, call)
        container.save()
        container.directory.write("config.json", self._spec(container, spec, stdio))
        prepared = self._lifecycle.prepare(container, process, spec)
        try:
            stream_images.begin(prepared, self._registry.keeper, source, images)
            process.slots = prepared.slots
            await self._launch(container, process, prepared, source, call)
        finally:
            prepared.close_child()
            self._free_unused(process)
        _end_input(process)
        self._limit(container, saved)
        return process

    async def _root(
        self,
        container: Container,
        about: Checkpoint,
        saved: Saved,
        spec: dict[str, Any],
        source: CheckpointDir,
        call: Call,
    ) -> str:
        lower = saved.lower or str(spec["root"]["path"])
        if not os.path.isdir(lower):
            raise RpcError(
                Code.NOT_FOUND,
                f"{lower}, the root the container had, is no directory in the guest: its files must be there",
            )
        container.root = lower
        container.save()
        if not about.overlay:
            return lower
        upper, _, _ = container.directory.overlay_directories()
        tar = [
            "tar",
            "--extract",
            "--file",
            source.upper,
            "--directory",
            upper,
            *TAR_OPTIONS,
            "--same-permissions",
        ]
        await criu.run(self._registry.caller, tar, call.timeout)
        return await overlay.mount(self._registry.caller, container.directory, lower, mapped_root(spec))

    def _spec(self, container: Container, spec: dict[str, Any], stdio: Stdio) -> dict[str, Any]:
        """The spec that was saved, for where and what this container is."""
        config = os.path.join(container.directory.path, "criu.conf")
        with open(config, "w", encoding="ascii") as file:
            file.write(CRIU_OPTIONS)
        spec = copy.deepcopy(spec)
        spec["root"]["path"] = container.root
        spec["annotations"] = {**(spec.get("annotations") or {}), CRIU_CONFIG: config}
        if _owns_network(spec):
            hooks = spec["hooks"] = dict(spec.get("hooks") or {})
            hook = {
                "path": "/bin/sh",
                "args": ["sh", "-c", LOOPBACK_UP],
                "env": [f"PATH={os.environ['PATH']}"],
            }
            hooks["createRuntime"] = [*(hooks.get("createRuntime") or []), hook]
        return bundle.finish(spec, stdio, container.cgroup.path)

    def _limit(self, container: Container, saved: Saved) -> None:
        """The limits in force, which need not be the spec's. What this guest cannot limit it does not."""
        known = {name for names in limit_files.FILES.values() for name in names}
        wanted = {name: text for name, text in saved.limits.items() if name in known}
        limit_files.restore(container.cgroup, wanted)
        container.io_limits = saved.io_limits
        with contextlib.suppress(OSError):
            io_limits.write_table(container.cgroup, container.io_limits)

    def _free_unused(self, process: Process) -> None:
        """The counters of a terminal that never came."""
        if process.slots.get("tty") and "tty" not in process.streams:
            for slot in process.slots.pop("tty"):
                self._registry.keeper.counters.free(slot)

    async def _launch(
        self,
        container: Container,
        process: Process,
        prepared: PreparedStdio,
        source: CheckpointDir,
        call: Call,
    ) -> None:
        directory = container.directory.begin(INIT, process.document())
        work = os.path.join(container.directory.path, "criu")
        os.mkdir(work, mode=0o700)
        options = criu_options(source.read()[0], source, work)
        launch = prepared.launch(os.path.join(directory, "pid"))
        try:
            launched = await container.runtime.restore(
                container.ident, container.directory.path, options, launch, call.timeout
            )
        except RuntimeFailure as failure:
            log = os.path.join(work, "restore.log")
            raise criu.explain(failure, f"restore {source.path}", log) from failure
        shutil.rmtree(work)
        await self._lifecycle.take_up(container, process, prepared, launched)


def restored(registry: Registry, container: Container, process: Process) -> None:
    """It runs: that is written down, told, and no longer the supervisor's to remember."""
    container.status = Status.RUNNING
    container.save()
    registry.oom.begin(container)
    registry.events.publish("container.restored", container.ident, INIT, pid=process.pid)
    registry.running(container, process, time.time_ns())
    registry.caller.forget(launch_call(process.key))


def _end_input(process: Process) -> None:
    """An input that had ended, or was to end, does so again."""
    stream = process.streams.get("stdin")
    if isinstance(stream, InputStream) and (offset := stream.closing_at()) is not None:
        stream.close_input(offset)


def _with_size(stdio: Stdio, images: stream_images.Images) -> Stdio:
    """The terminal has the size it had last."""
    size = images.get("tty", {}).get("size")
    return replace(stdio, winsize=Winsize(*size)) if size else stdio


def _owns_network(spec: dict[str, Any]) -> bool:
    return any(
        namespace.get("type") == "network" and not namespace.get("path")
        for namespace in (spec.get("linux") or {}).get("namespaces") or ()
    )
