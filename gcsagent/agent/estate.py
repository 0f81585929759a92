"""What an earlier agent left with the supervisor and in the ring of events, and what it is taken up with.

Processes alive and ended, calls that ran on, descriptors by name, events told: asked for once, at a start.
"""

from __future__ import annotations

import logging
import os
import time
from typing import Any

from gcsagent.agent import freezing, stdio
from gcsagent.agent.container import Container
from gcsagent.agent.events import of_this_life
from gcsagent.agent.logs import context
from gcsagent.agent.process import Process
from gcsagent.agent.registry import Registry
from gcsagent.agent.supervisor_client import SupervisorClient, SupervisorError
from gcsagent.agent.terminal import DiscardedTty, TtyStream
from gcsagent.common.channel import MAX_FDS
from protocol.checks import INIT
from protocol.types import Event, ExitRecord, Reason, Status

_log = logging.getLogger("agent.estate")


class Estate:
    """``held`` is descriptors by process key, stream and suffix; ``alive`` pids and ``exits`` the
    supervisor's records, by process key; ``calls`` keys; ``closing`` where input was to end;
    ``ended_since`` what has been told of exits from the start on."""

    def __init__(self, registry: Registry, supervisor: SupervisorClient) -> None:
        self._registry, self._supervisor = registry, supervisor
        self.held: dict[str, dict[str, dict[str, int]]] = {}
        self.alive: dict[str, int] = {}
        self.exits: dict[str, dict[str, Any]] = {}
        self.calls: set[str] = set()
        self.ended_since: list[dict[str, Any]] = []
        self.events: list[Event] = []
        self.told: set[tuple[str, str, str, Any]] = set()
        self.freezes_told: dict[str, str] = {}
        self.closing: dict[str, dict[str, int]] = {}

    async def ask(self) -> None:
        """Finds out what there is; nothing else here may be used before."""
        self.calls = {key for key, _ in await self._supervisor.everything("calls")}
        self.alive = dict(await self._supervisor.everything("processes"))
        self.exits |= dict(await self._supervisor.everything("exits"))
        names = [name for name in await self._supervisor.everything("names") if name.startswith("fd/")]
        for start in range(0, len(names), MAX_FDS):
            batch = names[start : start + MAX_FDS]
            _, fds = await self._supervisor.request("fetch", {"names": batch})
            for name, fd in zip(batch, fds, strict=True):
                _, container, process, stream = name.split("/")
                stream, _, suffix = stream.partition(".")
                self.held.setdefault(f"{container}/{process}", {}).setdefault(stream, {})[suffix] = fd
        self.events = list(self._registry.events.all())
        self.told = {
            (event.type, event.container, event.process, event.data.get("stream", event.data.get("pid")))
            for event in self.events
        }
        self.freezes_told = freezing.last_told(self.events)

    def exited(self, record: dict[str, Any]) -> None:
        """The supervisor's notification of an exit, while this is being taken up."""
        self.ended_since.append(record)
        self.alive.pop(record["process"], None)
        self.exits[record["process"]] = {name: value for name, value in record.items() if name != "process"}

    async def pidfd(self, key: str) -> int:
        """-1 for a process that has ended; :attr:`exits` has how. Raises SupervisorError."""
        if key not in self.alive:
            return -1
        try:
            _, fds = await self._supervisor.request("pidfd", {"process": key})
        except SupervisorError:
            if key in self.exits:
                return -1  # meanwhile: that is told before this is refused
            raise
        return fds[0]

    async def take_terminal(self, process: Process) -> None:
        """Its pty master may have come from the runtime after :meth:`ask`. Raises SupervisorError if it has
        not come at all."""
        held = self.held.setdefault(process.key, {}).setdefault("tty", {})
        if "" not in held:
            (held[""],) = await self._supervisor.fetch([stdio.stream_name(process.key, "tty")])

    def restore_streams(self, container: Container, process: Process) -> None:
        held = self.held.pop(process.key, {})
        untouched = process.stdio.terminal and "tty" not in process.slots
        if untouched:  # killed before the terminal's counters were written down: not a byte had been moved
            process.slots["tty"] = [self._registry.keeper.counters.allocate() for _ in range(2)]
        process.streams = stdio.restore(
            self._registry.keeper,
            process.key,
            process.stdio,
            process.slots,
            held,
            lambda name, count: self._registry.stream_ended(container, process, name, count),
        )
        tty = process.streams.get("tty")
        if untouched and isinstance(tty, TtyStream | DiscardedTty) and not tty.state().ended:
            tty.resize(process.stdio.winsize.rows, process.stdio.winsize.cols)
        for name, offset in self.closing.pop(process.key, {}).items():
            process.stream(name).close_input(offset)
        for name, stream in process.streams.items():
            state = stream.state()
            if state.ended and name in process.slots:
                self.publish_once(
                    "stream.end", container, process, name, {"stream": name, "bytes": state.bytes}
                )

    def publish_once(
        self, kind: str, container: Container, process: Process, mark: Any, data: dict[str, Any]
    ) -> None:
        """An event that may have been published, and may not, before the agent was killed."""
        if (kind, container.ident, process.ident, mark) not in self.told:
            self.note(container, f"{kind} had not been told", process=process.ident)
            self._registry.events.publish(kind, container.ident, process.ident, **data)

    def end_what_has_ended(self, container: Container) -> None:
        """Ends, execs first, what ended while no agent was there; LOST is what nobody has seen end."""
        for process in sorted(container.processes.values(), key=lambda process: process.is_init):
            if process.exit is not None or process.status is Status.CREATING or process.pidfd >= 0:
                continue
            record = self.exits.get(process.key)
            if record is not None:
                self.note(container, "an exit came meanwhile", process=process.ident)
                self._registry.on_exit({"process": process.key, **record})
            else:
                self.note(container, "a process is gone without a trace", process=process.ident)
                self._lose(container, process)
        init = container.processes.get(INIT)
        if (
            init is not None
            and init.exit is not None
            and container.status in (Status.CREATED, Status.RUNNING, Status.PAUSED)
        ):
            container.status = Status.STOPPED
            if not of_this_life(container.ident, self.events, "container.stopped"):
                self.note(container, "its stop had not been told")
                self._registry.init_ended(container)
        elif container.status is Status.RUNNING and container.cgroup.is_frozen():
            self.note(container, "a signal to all of it had left it frozen")
            container.cgroup.unfreeze()

    def _lose(self, container: Container, process: Process) -> None:
        record = ExitRecord(255, 0, Reason.LOST, process.pid, process.started_at_ns, time.time_ns())
        process.restore_exit(record)
        self.publish_once(
            "process.exited",
            container,
            process,
            process.pid,
            {"exit_code": 255, "reason": "lost", "pid": process.pid},
        )

    def drop_held(self, key: str) -> None:
        for stream, fds in self.held.pop(key, {}).items():
            for suffix, fd in fds.items():
                os.close(fd)
                name = stdio.stream_name(key, stream)
                self._supervisor.release(f"{name}.{suffix}" if suffix else name)

    def note(self, container: Container, what: str, process: str = "") -> None:
        context(_log, container=container.ident, process=process).info(what)
