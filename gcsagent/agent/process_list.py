"""container.processes: every process in a container, whoever made it, read from /proc.

A process is in the container when it is in its cgroup or, where the container has one of its own, in its
pid namespace. A zombie is in no cgroup.procs any more: it is found by its namespace, or by the cgroup it
left behind in /proc/PID/cgroup (which v1 does not keep).

Each process is read through a descriptor of its /proc directory: once it has been reaped every read fails,
even if its pid is used again. What is known by number alone (a line of cgroup.procs, an exec's pid) counts
for a process only if it had started by the time the number was read.

Reading a command line waits for the process's memory map, which a stuck file system can hold: it is done
in a thread of its own that nobody waits for beyond the deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from gcsagent.agent.call import Call
from gcsagent.agent.container import Container
from gcsagent.agent.proc import Stat, fields, parse_stat, status
from gcsagent.agent.process import Process
from gcsagent.agent.registry import Registry
from protocol.checks import INIT
from protocol.dataclass import dataclass
from protocol.errors import Code, RpcError
from protocol.families.container import ListProcesses, ProcessList
from protocol.limits import MAX_COMMAND, MAX_FRAME
from protocol.usage import ContainerProcess

T = TypeVar("T")
MAX_STUCK = 4
"""Threads that may be reading at a time; one that hangs is never got rid of."""

TURN_SECONDS = 2.0
"""How long a request waits for one of them: a crowd is through in less, each takes milliseconds."""

PAGE_BYTES = MAX_FRAME // 2
ENTRY_BYTES = 300
"""Of one process in a message, beside its command line: 14 names and their values."""

_TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
_GONE = (FileNotFoundError, ProcessLookupError)


@dataclass(frozen=True, slots=True)
class Scope:
    """What is in the container, as it was at ``taken_ticks`` of the boot clock.

    ``namespace`` is the inode of its own pid namespace, 0 without one; ``depth`` how many levels below the
    agent's that is; ``known`` the process ids of what the runtime made, by pid.
    """

    cgroup: str
    listed: frozenset[int]
    known: dict[int, str]
    namespace: int
    depth: int
    taken_ticks: int


class ProcessListService:
    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._turns = asyncio.Semaphore(MAX_STUCK)

    async def processes(self, params: ListProcesses, _call: Call) -> ProcessList:
        try:
            async with asyncio.timeout(TURN_SECONDS):
                await self._turns.acquire()
        except TimeoutError:
            raise RpcError(
                Code.RESOURCE_EXHAUSTED,
                f"{MAX_STUCK} requests for processes have not ended: a process's memory cannot be read;"
                " kill the container it is in, or try again",
            ) from None
        try:
            container = self._registry.get(params.container)
            container.check("list the processes of")
            scope = scope_of(container)
        except BaseException:
            self._turns.release()
            raise
        return await _in_thread(lambda: read_page(scope, params.after, params.limit), self._turns.release)


def scope_of(container: Container) -> Scope:
    known = {process.pid: process.ident for process in container.processes.values() if _is_there(process)}
    namespace = depth = 0
    init = container.processes.get(INIT)
    if init is not None and init.pid in known:
        with contextlib.suppress(OSError):
            depth = len(status(init.pid).get("NSpid", "").split()) - 1
            if container.owns_pids:
                namespace = os.stat(f"/proc/{init.pid}/ns/pid").st_ino
        if not _is_there(init):  # it has been reaped meanwhile, and what was read may be another's
            namespace = depth = 0
    listed = frozenset(container.cgroup.pids())
    return Scope(container.cgroup.path, listed, known, namespace, depth, _boot_ticks())


def read_page(scope: Scope, after: int, limit: int) -> ProcessList:
    """The processes with a pid above ``after``, as many as fit; the rest is counted."""
    found: list[ContainerProcess] = []
    left_out = room = 0
    for pid, directory in _directories(after):
        with contextlib.suppress(*_GONE):
            stat = _stat(directory)
            if not _is_member(scope, pid, directory, stat):
                continue
            if left_out or len(found) >= limit:
                left_out += 1
                continue
            process = _read_process(scope, pid, directory, stat)
            room += ENTRY_BYTES + len(process.command.encode())
            if room > PAGE_BYTES:
                left_out += 1
            else:
                found.append(process)
    return ProcessList(tuple(found), left_out)


def _directories(after: int) -> Iterator[tuple[int, int]]:
    """Descriptors of the /proc directories of all processes, by pid; each is closed when the next comes."""
    pids = sorted(int(name) for name in os.listdir("/proc") if name.isdigit())
    for pid in pids:
        if pid <= after:
            continue
        try:
            directory = os.open(f"/proc/{pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except _GONE:
            continue
        try:
            yield pid, directory
        finally:
            os.close(directory)


def _stat(directory: int) -> Stat:
    return parse_stat(_read(directory, "stat", 4096))


def _is_member(scope: Scope, pid: int, directory: int, stat: Stat) -> bool:
    if stat.started_ticks <= scope.taken_ticks and (pid in scope.listed or pid in scope.known):
        return True
    if scope.namespace:
        with contextlib.suppress(PermissionError):
            if os.stat("ns/pid", dir_fd=directory).st_ino == scope.namespace:
                return True
    return stat.ended and _left_cgroup(scope.cgroup, directory)


def _left_cgroup(path: str, directory: int) -> bool:
    """Lines are ``HIERARCHY:CONTROLLERS:PATH`` (cgroups(7))."""
    text = _read(directory, "cgroup", 1 << 16).decode(errors="replace")
    paths = [line.split(":", 2)[-1] for line in text.splitlines()]
    return any(found == path or found.startswith((path + "/", path + " ")) for found in paths)


def _read_process(scope: Scope, pid: int, directory: int, stat: Stat) -> ContainerProcess:
    about = fields(_read(directory, "status", 1 << 16).decode(errors="replace"))
    ident = scope.known.get(pid, "") if stat.started_ticks <= scope.taken_ticks else ""
    inside = about.get("NSpid", "").split()
    resident = about.get("VmRSS", "0").split()
    return ContainerProcess(
        pid=pid,
        ns_pid=int(inside[scope.depth]) if len(inside) > scope.depth else 0,
        ppid=stat.ppid,
        uid=int(about["Uid"].split()[1]),
        running=not stat.ended,
        created_by_runtime=bool(ident),
        zombie=stat.ended,
        process=ident,
        state=stat.state,
        command=_command(directory) or f"[{stat.name}]",
        threads=stat.threads,
        started_at_ns=_epoch_of(stat.started_ticks),
        cpu_us=stat.cpu_ticks * _TICK_NS // 1000,
        rss_bytes=int(resident[0]) * 1024,
    )


def _command(directory: int) -> str:
    data = _read(directory, "cmdline", MAX_COMMAND + 1)
    text = data[:MAX_COMMAND].rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace")
    return f"{text}…" if len(data) > MAX_COMMAND else text


def _read(directory: int, name: str, size: int) -> bytes:
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    try:
        return os.read(fd, size)
    finally:
        os.close(fd)


def init_started_at_ns(container: Container) -> int:
    """When the kernel made init, since the epoch; 0 when it has been reaped."""
    init = container.processes.get(INIT)
    started = 0
    if init is not None and _is_there(init):
        with contextlib.suppress(*_GONE):
            directory = os.open(f"/proc/{init.pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                started = _epoch_of(_stat(directory).started_ticks)
            finally:
                os.close(directory)
    return started if init is not None and _is_there(init) else 0


def _is_there(process: Process) -> bool:
    """It has not been reaped, so its pid is its own."""
    if not process.alive or process.pidfd < 0:
        return False
    try:
        signal.pidfd_send_signal(process.pidfd, 0)
    except ProcessLookupError:
        return False
    return True


def _boot_ticks() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // _TICK_NS


def _epoch_of(ticks: int) -> int:
    return time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME) + ticks * _TICK_NS


async def _in_thread(work: Callable[[], T], done: Callable[[], None]) -> T:
    """``work``'s result; ``done`` is called when it has ended, however long after the caller has gone."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def finish(result: T | None, error: BaseException | None) -> None:
        done()
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except Exception as caught:
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop is closed: the agent is ending
            loop.call_soon_threadsafe(finish, result, error)

    try:
        threading.Thread(target=run, name="processes", daemon=True).start()
    except RuntimeError as error:
        done()
        raise RpcError(Code.RESOURCE_EXHAUSTED, "the guest has no room for another thread") from error
    return await future
