"""The one place that waits for children: runtime calls, container processes, orphans.

The classic loss in an agent is the exit of a process that dies before its pid is known: runc starts it,
it ends, somebody's catch-all wait reaps it, and then runc's pid file names nobody. Here

* a *call* (a run of runc) and a *process* (a container's init or an exec, once claimed) each have a pidfd
  in epoll, and are waited for by pid;
* any other child that has ended is peeked at with WNOWAIT and left a zombie for as long as a call that was
  under way when it was first seen may still name it in its pid file. Its pid cannot be used again
  meanwhile, so pid file and zombie are matched without a race. Calls have deadlines: the hold is bounded;
* what is left then is an orphan, and is reaped.

Nothing here waits: a tracer sees the end of what it traces before the parent may (ptrace(2)), takes as long
as it likes over that, and may be any process in a container. SIGCHLD says when it is our turn.

An unreaped exec keeps the init of its pid namespace from becoming waitable (the kernel's
zap_pid_ns_processes waits for it), which is why the hold is as short as this.
"""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable

from gcsagent.common.loop import Loop, Timer
from gcsagent.supervisor.console import ConsoleSocket
from gcsagent.supervisor.exits import ExitRecords, describe
from gcsagent.supervisor.log import log
from gcsagent.supervisor.spawn import spawn

TYPE_CHECKING = False  # typing itself is half a megabyte
if TYPE_CHECKING:
    import resource
    from typing import Any

_PEEK = os.WEXITED | os.WNOHANG | os.WNOWAIT


class Call:
    """One run of the runtime on the agent's behalf; ``result`` is None until it has ended."""

    __slots__ = (
        "console",
        "forgotten",
        "key",
        "number",
        "pid",
        "pid_file",
        "pidfd",
        "process",
        "result",
        "timed_out",
        "timer",
    )

    def __init__(
        self, key: str, number: int, pid_file: str, process: str, console: ConsoleSocket | None
    ) -> None:
        self.key, self.number, self.pid_file, self.process = key, number, pid_file, process
        self.console = console
        self.pid = self.pidfd = -1
        self.timer: Timer | None = None
        self.timed_out = False
        self.forgotten = False  # nobody wants the result
        self.result: dict[str, Any] | None = None


class Process:
    """A claimed process that is still alive."""

    __slots__ = ("key", "pid", "pidfd")

    def __init__(self, key: str, pid: int, pidfd: int) -> None:
        self.key, self.pid, self.pidfd = key, pid, pidfd


class Reaper:
    """``call_ended(call)`` and ``process_ended(key, record)`` are told once each, after the fact is kept."""

    def __init__(
        self,
        loop: Loop,
        exits: ExitRecords,
        call_ended: Callable[[Call], None],
        process_ended: Callable[[str, dict[str, Any]], None],
    ) -> None:
        self._loop, self._exits = loop, exits
        self._call_ended, self._process_ended = call_ended, process_ended
        self._numbers = itertools.count(1)
        self.started = 0  # calls, ever
        self._held: dict[int, int] = {}  # zombie pid -> number of the newest call that may still name it
        self._traced: dict[int, Callable[[], None]] = {}  # ended, but a tracer has not let go of them yet
        self.own: set[int] = set()  # children somebody else here waits for: the agent
        self.calls: dict[str, Call] = {}
        self.processes: dict[str, Process] = {}

    # -- starting -------------------------------------------------------------------------------

    def start_call(
        self,
        key: str,
        argv: list[str],
        env: dict[str, str],
        fds: dict[int, int],
        *,
        pid_file: str = "",
        process: str = "",
        console: ConsoleSocket | None = None,
        timeout: float,
    ) -> Call:
        """Raises OSError when the program cannot be started. ``process`` is the key to claim its child by."""
        call = Call(key, next(self._numbers), pid_file, process, console)
        call.pid = spawn(argv, env, fds)
        self.started += 1
        _share_no_protection(call.pid)
        try:
            call.pidfd = os.pidfd_open(call.pid)
        except OSError:  # out of descriptors: it runs, but its end would go unseen
            _kill_group(call.pid)
            raise
        call.timer = self._loop.after(timeout, lambda: self._time_out(call))
        self.calls[key] = call
        self._loop.watch(call.pidfd, lambda _events: self._finish_call(call))
        return call

    def cancel_call(self, key: str) -> None:
        """Kills the process group of a call: the runtime and its helpers; containers have their own."""
        call = self.calls.get(key)
        if call is not None and call.result is None:
            _kill_group(call.pid)

    def forget_call(self, key: str) -> None:
        """Drops a call's result, now or when it has one."""
        call = self.calls.get(key)
        if call is not None:
            call.forgotten = True
            if call.result is not None:
                del self.calls[key]

    def _time_out(self, call: Call) -> None:
        call.timed_out = True
        log("warning", "a runtime call passed its deadline and is killed", call=call.key)
        _kill_group(call.pid)

    # -- endings --------------------------------------------------------------------------------

    def take_end(
        self, pid: int, pidfd: int, later: Callable[[], None]
    ) -> tuple[int, resource.struct_rusage] | None:
        """Reaps a child whose ``pidfd``, which is closed, says that it has ended: its status and its usage.

        None while it is traced: ``later`` is called, to come here again, when that may be over.
        """
        found, status, usage = os.wait4(pid, os.WNOHANG)
        self._loop.forget(pidfd)  # which stays readable
        if not found:
            self._traced[pid] = later
            return None
        self._traced.pop(pid, None)
        os.close(pidfd)
        return status, usage

    def on_child(self) -> None:
        """SIGCHLD: some child has ended, or has been let go by its tracer."""
        for later in list(self._traced.values()):
            later()
        self.reap_orphans()

    def _finish_call(self, call: Call) -> None:
        if _failed(call.pid):
            _kill_group(call.pid)  # what it left running in its own session; not reaped, its pid is its own
        ended = self.take_end(call.pid, call.pidfd, lambda: self._finish_call(call))
        if ended is None:
            return
        status, _ = ended
        call.pidfd = -1
        if call.timer is not None:
            call.timer.cancel()
        if call.console is not None:
            call.console.finish()
        call.result = {"status": status, "timed_out": call.timed_out, "pid": 0}
        if call.process:
            call.result.update(self._claim(call))
        self._call_ended(call)
        if call.forgotten:
            del self.calls[call.key]
        self.reap_orphans()

    def _claim(self, call: Call) -> dict[str, Any]:
        """Makes the pid in the call's pid file a process of ours, dead or alive."""
        try:
            pid = _read_pid(call.pid_file)
        except (OSError, ValueError) as error:
            return {"pid_error": f"pid file: {error}"}
        if pid in self._known():
            return {"pid_error": f"process {pid} named by the pid file is another's already"}
        try:
            ended = os.waitid(os.P_PID, pid, _PEEK) is not None
            pidfd = os.pidfd_open(pid)
        except ChildProcessError:
            return {"pid_error": f"process {pid} named by the pid file is not our child"}
        except OSError as error:
            return {"pid_error": f"process {pid} cannot be watched: {error}"}
        self._held.pop(pid, None)
        process = Process(call.process, pid, pidfd)
        self.processes[call.process] = process
        if ended:
            self._finish_process(process)
        else:
            self._loop.watch(process.pidfd, lambda _events: self._finish_process(process))
        return {"pid": pid}

    def _finish_process(self, process: Process) -> None:
        # Recording needs the rusage, which only a reaping wait gives; nothing can come between the two
        # that would keep either from happening but the death of this process, and with it of all.
        ended = self.take_end(process.pid, process.pidfd, lambda: self._finish_process(process))
        if ended is None:
            return
        record = describe(process.pid, *ended)
        self._exits.add(process.key, record)
        del self.processes[process.key]
        self._process_ended(process.key, record)

    # -- orphans --------------------------------------------------------------------------------

    def reap_orphans(self) -> None:
        """Reaps every ended child that nobody can claim any more."""
        known = self._known()
        claiming = [call.number for call in self.calls.values() if call.process and call.result is None]
        oldest, newest = (min(claiming), max(claiming)) if claiming else (0, 0)
        for pid in self._ended_children(known):
            if oldest and self._held.setdefault(pid, newest) >= oldest:
                continue
            self._held.pop(pid, None)
            os.waitpid(pid, 0)

    def is_claimed(self, process: str) -> bool:
        """Somebody alive is known by that key, or a call under way is going to claim its child by it."""
        return process in self.processes or any(
            call.process == process for call in self.calls.values() if call.result is None
        )

    @property
    def busy(self) -> bool:
        """Something we started, or claimed, is alive."""
        return bool(self.processes) or any(call.result is None for call in self.calls.values())

    def _known(self) -> set[int]:
        """Children that are waited for by pid: never an orphan, never to be claimed by somebody else."""
        known = self.own.union(call.pid for call in self.calls.values() if call.result is None)
        known.update(process.pid for process in self.processes.values())
        return known

    def _ended_children(self, known: set[int]) -> list[int]:
        """Zombies that are not ``known``. WNOWAIT shows only the first one, so /proc lists the rest."""
        first = _peek(os.P_ALL, 0)
        if first is None:
            return []
        try:
            with open("/proc/thread-self/children", encoding="ascii") as file:
                children = [int(word) for word in file.read().split()]
        except OSError:
            # CONFIG_PROC_CHILDREN is off, or no descriptor is left: one at a time, the head first.
            children = [first]
        return [pid for pid in children if pid not in known and _peek(os.P_PID, pid) is not None]


def _read_pid(path: str) -> int:
    """What a pid file says. Raises OSError or ValueError; never waits, not even for a FIFO's writer."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        text = os.read(fd, 32).decode("ascii").strip()
    finally:
        os.close(fd)
    if not 0 < len(text) <= 10 or not text.isdigit() or not 0 < int(text) < 1 << 31:
        raise ValueError(f"{text!r} is no pid")
    return int(text)


def _peek(kind: int, pid: int) -> int | None:
    try:
        found = os.waitid(kind, pid, _PEEK)
    except ChildProcessError:
        return None
    return None if found is None else found.si_pid


def _share_no_protection(pid: int) -> None:
    """The kernel may kill the runtime for want of memory as it may anything else, only not us.

    oom_score_adj is inherited. What the runtime starts for a container has a value of its own, from the spec.
    """
    try:
        fd = os.open(f"/proc/{pid}/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return  # it has ended
    try:
        os.write(fd, b"0")
    except OSError:
        return  # we were not allowed to protect ourselves either
    finally:
        os.close(fd)


def _failed(pid: int) -> bool:
    """Whether a child that has ended, and is not reaped yet, did so other than with status 0."""
    ended = os.waitid(os.P_PID, pid, _PEEK)
    return ended is not None and ended.si_status != 0


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
