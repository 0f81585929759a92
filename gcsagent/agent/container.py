"""One container, and which requests its status allows."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from gcsagent.agent.cgroups import Cgroup
from gcsagent.agent.changes import Change
from gcsagent.agent.journal import RequestMark
from gcsagent.agent.oom import OomAccount
from gcsagent.agent.pods.pod import ALONE
from gcsagent.agent.process import Process
from gcsagent.agent.process_dir import ContainerDir
from gcsagent.agent.runtime import Runtime
from protocol.checks import INIT
from protocol.errors import Code, RpcError
from protocol.types import ContainerState, Status

ALLOWED: dict[str, frozenset[Status]] = {
    "start": frozenset({Status.CREATED}),
    "exec in": frozenset({Status.CREATED, Status.RUNNING}),
    "kill": frozenset({Status.CREATED, Status.RUNNING, Status.PAUSED}),
    "list the processes of": frozenset(
        {Status.CREATED, Status.RUNNING, Status.PAUSED, Status.STOPPED, Status.FAILED}
    ),
    "forward into": frozenset({Status.CREATED, Status.RUNNING, Status.PAUSED}),
    "read the statistics of": frozenset({Status.CREATED, Status.RUNNING, Status.PAUSED, Status.STOPPED}),
    "update": frozenset({Status.CREATED, Status.RUNNING, Status.PAUSED}),
    "copy files of": frozenset({Status.CREATED, Status.RUNNING, Status.PAUSED, Status.STOPPED}),
    "configure the network of": frozenset({Status.CREATED, Status.RUNNING, Status.PAUSED}),
    "pause": frozenset({Status.RUNNING}),
    "resume": frozenset({Status.PAUSED}),
    "checkpoint": frozenset({Status.RUNNING, Status.PAUSED}),
    "add to the pod of": frozenset({Status.CREATED, Status.RUNNING}),
    "read the statistics of the pod of": frozenset(
        {Status.CREATED, Status.RUNNING, Status.PAUSED, Status.STOPPED}
    ),
    "update the pod of": frozenset({Status.CREATED, Status.RUNNING, Status.PAUSED, Status.STOPPED}),
    "delete": frozenset({Status.CREATED, Status.STOPPED, Status.FAILED, Status.DELETING}),
    "force the deletion of": frozenset(set(Status) - {Status.CREATING}),
}
"""For each request, the statuses it is allowed in; any other is FAILED_PRECONDITION naming both.

One to delete what is being deleted waits for the same deletion."""

REQUESTS: dict[str, tuple[str, Status | None]] = {
    "container.create with pod": ("add to the pod of", None),
    "pod.update": ("update the pod of", None),
    "pod.stats": ("read the statistics of the pod of", None),
    "container.start": ("start", Status.RUNNING),
    "process.exec": ("exec in", None),
    "container.kill": ("kill", None),
    "container.pause": ("pause", Status.PAUSED),
    "container.resume": ("resume", Status.RUNNING),
    "container.update": ("update", None),
    "container.stats": ("read the statistics of", None),
    "container.processes": ("list the processes of", None),
    "archive.put": ("copy files of", None),
    "archive.get": ("copy files of", None),
    "forward.open with container": ("forward into", None),
    "container.checkpoint": ("checkpoint", Status.STOPPED),
    "container.checkpoint with leave_running": ("checkpoint", None),
    "network.apply with container": ("configure the network of", None),
    "network.state with container": ("configure the network of", None),
    "container.delete": ("delete", Status.DELETING),
    "container.delete with force": ("force the deletion of", Status.DELETING),
}
"""The key in ALLOWED of each request, and the status it leads to, if to another. Those that are not here
are allowed in every status."""


class Container:
    def __init__(
        self,
        ident: str,
        directory: ContainerDir,
        cgroup: Cgroup,
        runtime: Runtime,
        *,
        auto_delete: bool,
        labels: dict[str, str],
    ) -> None:
        self.ident, self.directory, self.cgroup, self.runtime = ident, directory, cgroup, runtime
        self.auto_delete, self.labels = auto_delete, labels
        self.status = Status.CREATING
        self.problem = ""
        self.owns_pids = True
        self.root = ""
        self.role = ALONE
        self.created_at_ns = time.time_ns()
        self.oom = OomAccount()
        self.create_request: RequestMark | None = None
        self.start_request: RequestMark | None = None
        self.delete_request: RequestMark | None = None
        self.freeze_request: RequestMark | None = None
        self.change: Change | None = None
        self.io_limits: dict[str, dict[str, int]] = {}
        self.changing = asyncio.Lock()
        self.checkpointing: dict[str, Any] | None = None
        self.restored_from = ""
        self.deletion: asyncio.Task[None] | None = None
        self.sweep: asyncio.Task[None] | None = None
        """Ends what init left behind."""
        self.visitors: set[asyncio.Task[None]] = set()
        """Who is at work in its root directory: archivers."""
        self.processes: dict[str, Process] = {}

    @property
    def init(self) -> Process:
        return self.processes[INIT]

    @property
    def execs(self) -> list[Process]:
        return [process for process in self.processes.values() if not process.is_init]

    @property
    def exec_count(self) -> int:
        return len(self.processes) - (INIT in self.processes)

    def check(self, action: str) -> None:
        """Raises FAILED_PRECONDITION when ``action`` (a key of ALLOWED) is not for this status."""
        if self.status not in ALLOWED[action]:
            hint = f": {self.problem}" if self.problem else ""
            raise RpcError(
                Code.FAILED_PRECONDITION,
                f"cannot {action} container {self.ident}: it is {self.status.value}{hint}",
                status=self.status.value,
            )

    def process(self, ident: str) -> Process:
        process = self.processes.get(ident)
        if process is None:
            raise RpcError(Code.NOT_FOUND, f"container {self.ident} has no process {ident}")
        return process

    def save(self) -> None:
        """Writes container.json. Raises OSError."""
        self.directory.write("container.json", self.document())

    def state(self, *, processes: bool = True) -> ContainerState:
        init = self.processes.get(INIT)
        return ContainerState(
            container=self.ident,
            status=self.status,
            pid=init.pid if init is not None else 0,
            bundle=self.directory.path,
            created_at_ns=self.created_at_ns,
            auto_delete=self.auto_delete,
            problem=self.problem,
            runtime=self.runtime.name,
            labels=self.labels,
            processes=tuple(process.state() for process in self.processes.values()) if processes else (),
            process_count=len(self.processes),
            pod=self._pod(),
            share=self.role.member.share if self.role.member is not None else (),
            cgroup=self.cgroup.path,
        )

    def _pod(self) -> str:
        if self.role.member is not None:
            return self.role.member.sandbox
        return self.ident if self.role.sandbox is not None else ""

    def document(self) -> dict[str, Any]:
        """What container.json says of it."""
        return {
            "version": 1,
            "container": self.ident,
            "status": self.status.value,
            "runtime": self.runtime.binary,
            "owns_pids": self.owns_pids,
            "root": self.root,
            "pod": None if self.role is ALONE else self.role.document(),
            "cgroup": self.cgroup.path,
            "auto_delete": self.auto_delete,
            "labels": self.labels,
            "create_request": self.create_request,
            "start_request": self.start_request,
            "delete_request": self.delete_request,
            "freeze_request": self.freeze_request,
            "change": None if self.change is None else self.change.document(),
            "io_limits": self.io_limits,
            "checkpointing": self.checkpointing,
            "restored_from": self.restored_from,
            "created_at_ns": self.created_at_ns,
        }
