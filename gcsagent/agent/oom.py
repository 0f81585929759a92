"""Tells of processes the kernel killed for want of memory: the event ``container.oom``, the exit record.

The kernel's count in the container's cgroup is the truth; its log adds which process it was and whose memory
ran out. Where it says that the count has changed, cgroup v2 says it after the kill, v1 right before. What
has been told of each container is in ``oom.json`` of its directory, written behind the event: of the two,
the one that says more is right, so that a successor of this agent misses nothing and says nothing twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections import deque
from collections.abc import Coroutine, Iterable
from typing import TYPE_CHECKING, Any

from gcsagent.agent import proc
from gcsagent.agent.cgroups import OomCounts
from gcsagent.agent.events import EventLog, of_this_life
from gcsagent.agent.kernfs import KernelFiles
from gcsagent.agent.kmsg import KernelLog, Kill
from gcsagent.agent.logs import context
from protocol.schema import SchemaError, from_wire, to_wire
from protocol.types import Event, Oom, OomScope, OomVictim, Reason

if TYPE_CHECKING:
    from gcsagent.agent.container import Container
    from gcsagent.agent.process import Process

_log = logging.getLogger("agent.oom")

EVENT = "container.oom"
FILE = "oom.json"
MOST_VICTIMS = 16
KEPT = 8
"""Events kept per container: a victim's end is seen soon after the event that names it."""

LOG_SECONDS = 0.25
"""How long the log may take to name who was killed."""

V1_SECONDS = 5.0
"""How long the kernel may take from its notice to the kill: it writes to the console in between."""

_FIRST_LOOK, _LAST_LOOK = 0.01, 0.5
_PF_EXITING = 0x4  # linux/sched.h
_MEANS_NOTHING = (OSError, ValueError, KeyError, TypeError, SchemaError)


class OomAccount:
    """What has been told of one container."""

    def __init__(self) -> None:
        self.limits = 0
        self.recent: deque[Oom] = deque(maxlen=KEPT)
        self.blamed = 0
        """Processes whose end was put down to the last event without its naming them."""
        self.watch = -1
        self.notice = -1
        self.settling: asyncio.Task[None] | None = None
        self.noticed = False

    @property
    def told(self) -> int:
        return self.recent[-1].kills if self.recent else 0

    @property
    def last(self) -> Oom | None:
        return self.recent[-1] if self.recent else None

    def naming(self, process: Process) -> Oom | None:
        """The event that named it; by its pid alone if it was killed before it was known here."""
        for oom in reversed(self.recent):
            if any(each.pid == process.pid and each.process in (process.ident, "") for each in oom.victims):
                return oom
        return None

    def document(self) -> dict[str, Any]:
        return {"version": 1, "limits": self.limits, "recent": [to_wire(oom) for oom in self.recent]}


class OomWatch:
    """One for all containers. ``events`` is where it tells; in ``files`` it has one per container."""

    def __init__(self, events: EventLog, log: KernelLog, files: KernelFiles) -> None:
        self._events, self._log, self.files = events, log, files
        self._waiting: set[asyncio.Event] = set()  # of those who wait for the log

    # -- containers come and go -------------------------------------------------------------------

    def begin(self, container: Container) -> None:
        """Watches it from now on; what has happened so far is told now. Nothing to do for one watched."""
        account = container.oom
        if account.watch >= 0 or account.notice >= 0:
            return
        events = container.cgroup.file("memory.events")
        control = container.cgroup.file("memory.oom_control")
        try:
            if events is not None:
                account.watch = self.files.watch(events, lambda: self._noticed(container))
            elif control is not None:
                account.notice = _v1_notice(control)
                loop = asyncio.get_running_loop()
                loop.add_reader(account.notice, self._v1_noticed, container)
        except OSError as error:
            context(_log, container=container.ident).warning(
                "running out of memory is told only when a process ends", extra={"error": str(error)}
            )
        self._noticed(container)

    def end(self, container: Container) -> None:
        """Before its cgroup goes. What it had not told of is told."""
        self.look(container)
        account = container.oom
        if account.settling is not None:
            account.settling.cancel()
        if account.watch >= 0:
            self.files.forget(account.watch)
        if account.notice >= 0:
            asyncio.get_running_loop().remove_reader(account.notice)
            os.close(account.notice)
        account.watch = account.notice = -1

    def restore(self, container: Container, events: Iterable[Event]) -> None:
        """Takes up what an earlier agent told. ``events`` are all there are, oldest first."""
        account = container.oom
        try:
            document = container.directory.read(FILE)
            account.limits = int(document["limits"])
            account.recent.extend(from_wire(Oom, each) for each in document["recent"])
        except FileNotFoundError:
            pass
        except _MEANS_NOTHING as error:
            context(_log, container=container.ident).error(
                "what was told of its memory cannot be read", extra={"error": str(error)}
            )
        written = account.told
        account.recent.extend(
            oom
            for oom in (from_wire(Oom, event.data) for event in of_this_life(container.ident, events, EVENT))
            if oom.kills > written
        )
        if account.told > written:
            account.limits = container.cgroup.oom_counts().limits or 0
            self._save(container)
        last = account.last
        ended = [process.exit for process in container.processes.values() if process.exit is not None]
        account.blamed = sum(
            record.reason is Reason.OOM and record.oom == last and not _names(last, record.pid)
            for record in ended
        )

    # -- what happens -----------------------------------------------------------------------------

    def blame(self, container: Container, process: Process, killed: bool) -> tuple[bool, Oom | None]:
        """At the end of ``process``: whether it was the kernel's doing, and what its exit record says.

        ``killed``: it ended by SIGKILL. What had not been told before is told now.
        """
        account = container.oom
        if killed or process.is_init:
            self.look(container, process if killed else None)
        oom = account.naming(process) if killed else None
        if oom is None and killed and self._may_be_victim(container, process):
            account.blamed += 1
            oom = account.last
        return oom is not None, oom or (account.last if process.is_init else None)

    def look(self, container: Container, suspect: Process | None = None) -> None:
        """Tells of what has not been told; ``suspect`` has just ended by SIGKILL."""
        counts = container.cgroup.oom_counts()
        new = counts.kills - container.oom.told
        if new <= 0:
            return
        self._log.read()
        kills = self._take(container, new)
        victims = [OomVictim(each.pid, _process_of(container, each.pid), each.command) for each in kills]
        if (
            suspect is not None
            and len(kills) < new
            and all(each.pid != suspect.pid for each in victims)
            and not _explained(container, suspect)
        ):
            victims.append(OomVictim(suspect.pid, suspect.ident))
        self._tell(container, counts, tuple(victims[-MOST_VICTIMS:]), kills[-1] if kills else None)

    def _may_be_victim(self, container: Container, process: Process) -> bool:
        """Some were killed that nobody has named; this one was killed, and it is not known why."""
        account = container.oom
        last = account.last
        if last is None or last.new - len(last.victims) - account.blamed <= 0:
            return False
        return last.new <= MOST_VICTIMS and not _explained(container, process)

    def _noticed(self, container: Container) -> None:
        """v2: something in the file has changed."""
        account = container.oom
        if account.settling is None and container.cgroup.oom_counts().kills > account.told:
            account.settling = self._start(self._settle(container, LOG_SECONDS))

    def _v1_noticed(self, container: Container) -> None:
        """The kernel is going to kill, or the cgroup has gone."""
        account = container.oom
        os.eventfd_read(account.notice)
        account.noticed = True
        if account.settling is None:
            account.settling = self._start(self._settle(container, V1_SECONDS))

    async def _settle(self, container: Container, seconds: float) -> None:
        """Tells when count and log agree, or after ``seconds``; then what was noticed meanwhile, likewise."""
        account = container.oom
        account.noticed = True
        while account.noticed:
            account.noticed = False
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._agreement(container)
            self.look(container)
        account.settling = None

    async def _agreement(self, container: Container) -> None:
        """Looks whenever the log has been written to; v1 may have to do without, so now and then as well."""
        written = asyncio.Event()
        self._follow_log(written)
        try:
            delay = _FIRST_LOOK
            while not self._agree(container):
                written.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(delay):
                        await written.wait()
                delay = min(2 * delay, _LAST_LOOK)
        finally:
            self._unfollow_log(written)

    def _agree(self, container: Container) -> bool:
        self._log.read()
        new = container.cgroup.oom_counts().kills - container.oom.told
        return new > 0 and (self._log.fd < 0 or len(self._matching(container)) >= new)

    def _follow_log(self, written: asyncio.Event) -> None:
        if not self._waiting and self._log.fd >= 0:
            asyncio.get_running_loop().add_reader(self._log.fd, self._log_written)
        self._waiting.add(written)

    def _unfollow_log(self, written: asyncio.Event) -> None:
        self._waiting.discard(written)
        if not self._waiting and self._log.fd >= 0:
            asyncio.get_running_loop().remove_reader(self._log.fd)

    def _log_written(self) -> None:
        self._log.read()
        for written in self._waiting:
            written.set()

    def _matching(self, container: Container) -> list[Kill]:
        """Kills in the log that are this container's: by cgroup, or, where that was left out, by pid."""
        path = container.cgroup.path
        return [
            kill
            for kill in self._log.kills.values()
            if _within(kill.cgroup, path) or (not kill.cgroup and _process_of(container, kill.pid))
        ]

    def _take(self, container: Container, new: int) -> list[Kill]:
        """The last ``new`` of them. Older ones are of a time when nobody counted."""
        found = self._matching(container)
        for kill in found:
            del self._log.kills[kill.pid]
        return found[-new:]

    def _tell(
        self, container: Container, counts: OomCounts, victims: tuple[OomVictim, ...], kill: Kill | None
    ) -> None:
        account = container.oom
        scope, limit_cgroup = self._scope(container, counts, kill)
        new = counts.kills - account.told
        oom = Oom(scope, container.cgroup.path, limit_cgroup, counts.kills, new, victims)
        account.limits, account.blamed = counts.limits or 0, 0
        account.recent.append(oom)
        self._events.publish(EVENT, container.ident, **to_wire(oom))
        self._save(container)
        context(_log, container=container.ident).warning(
            "the kernel killed processes for want of memory", extra={"fields": to_wire(oom)}
        )

    def _scope(self, container: Container, counts: OomCounts, kill: Kill | None) -> tuple[OomScope, str]:
        path = container.cgroup.path
        if kill is not None and kill.machine:
            return OomScope.MACHINE, ""
        if kill is not None and kill.limit_cgroup:
            inside = _within(kill.limit_cgroup, path)
            return OomScope.CONTAINER if inside else OomScope.ANCESTOR, kill.limit_cgroup
        if counts.limits is None:
            return OomScope.UNKNOWN, ""
        if counts.limits > container.oom.limits:
            return OomScope.CONTAINER, path
        return OomScope.UNKNOWN if container.cgroup.limited_above() else OomScope.MACHINE, ""

    def _save(self, container: Container) -> None:
        try:
            container.directory.write(FILE, container.oom.document())
        except OSError as error:  # the ring of events says it as well, for as long as it reaches back
            context(_log, container=container.ident).error(
                "what was told of its memory cannot be written down", extra={"error": str(error)}
            )

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        task.add_done_callback(_log_failure)
        return task


def _v1_notice(control: str) -> int:
    """An eventfd that the kernel raises before it kills (cgroup-v1/memory.rst). Raises OSError."""
    notice = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        fd = os.open(control, os.O_RDONLY | os.O_CLOEXEC)
        try:
            register = os.open(
                os.path.join(os.path.dirname(control), "cgroup.event_control"), os.O_WRONLY | os.O_CLOEXEC
            )
            with open(register, "wb", buffering=0) as file:
                file.write(f"{notice} {fd}".encode())
        finally:
            os.close(fd)
    except OSError:
        os.close(notice)
        raise
    return notice


def _within(cgroup: str, path: str) -> bool:
    return cgroup == path or cgroup.startswith(f"{path}/")


def _process_of(container: Container, pid: int) -> str:
    """Its id, for one whose end has not been dealt with; empty for any other."""
    processes = container.processes.values()
    return next((each.ident for each in processes if each.pid == pid and each.exit is None), "")


def _names(oom: Oom | None, pid: int) -> bool:
    return oom is not None and any(victim.pid == pid for victim in oom.victims)


def _explained(container: Container, process: Process) -> bool:
    """Its SIGKILL was ours, or the kernel's because its pid namespace's init is ending."""
    if process.killed:
        return True
    return not process.is_init and container.owns_pids and _exiting(container.init.pid)


def _exiting(pid: int) -> bool:
    try:
        flags = proc.stat(pid).flags
    except (OSError, ValueError, IndexError):
        return True
    return bool(flags & _PF_EXITING)


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        _log.error("watching for kills failed", exc_info=task.exception())
