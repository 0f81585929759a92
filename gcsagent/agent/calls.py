"""Programs run by the supervisor on the agent's behalf: runc, mount, umount, rm."""

from __future__ import annotations

import asyncio
import fcntl
import functools
import itertools
import os
import signal
from typing import Any

from gcsagent.agent.supervisor_client import SupervisorClient, SupervisorError
from gcsagent.agent.turns import Turns
from protocol.dataclass import dataclass
from protocol.limits import Limits

TAIL = 4096
"""Bytes of standard error kept: the end of it is where a program says why it failed."""

CAPTURE = 64 * 1024
"""Bytes of output a program can leave with us: what it writes beyond fails, and takes no memory."""

SETTLE_SECONDS = 10.0
"""How long a killed call may take to be reaped: SIGKILL acts once the kernel lets the process run."""


class CannotStart(Exception):
    """The program could not be started; ``errno`` says why."""

    def __init__(self, program: str, message: str, errno: int) -> None:
        super().__init__(f"{program} cannot be started: {message}")
        self.reason, self.errno = message, errno


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call ended. ``status`` is the exit status, or minus the signal."""

    status: int
    timed_out: bool
    stderr: str
    pid: int = 0
    pid_error: str = ""
    exit: dict[str, Any] | None = None
    pidfd: int | None = None


class Caller:
    def __init__(
        self, supervisor: SupervisorClient, env: dict[str, str], prefix: str, limits: Limits | None = None
    ) -> None:
        """``prefix`` makes call keys unique across agents: the generation."""
        self.turns = Turns(limits or Limits())
        self._supervisor, self.env, self.prefix = supervisor, env, prefix
        self._numbers = itertools.count(1)

    async def run(
        self,
        argv: list[str],
        timeout: float,
        *,
        fds: dict[int, int] | None = None,
        hold: dict[str, int] | None = None,
        extra: dict[str, Any] | None = None,
        key: str = "",
    ) -> Outcome:
        """Runs ``argv`` to its end. Cancelled: kills it, waits for that, and only then is cancelled.

        A call with a ``key`` is remembered by the supervisor until :meth:`forget`, however it ends: should
        this agent be killed before it has written the result down, the next one can :meth:`join` it.

        ``fds`` are the child's descriptors (standard error is captured unless given, the rest /dev/null);
        ``hold`` goes to the supervisor's store in the same packet; ``extra`` are further arguments of the
        supervisor's ``spawn``. Raises CannotStart.
        """
        kept, key = bool(key), key or f"{self.prefix}.{next(self._numbers)}"
        wanted, stderr = dict(fds or {}), -1
        if 2 not in wanted:
            stderr = wanted[2] = capture("stderr")
        try:
            packet_fds = [*wanted.values(), *(hold or {}).values()]
            arguments = {
                "call": key,
                "argv": argv,
                "env": self.env,
                "timeout": timeout,
                "fds": {str(target): index for index, target in enumerate(wanted)},
                "hold": {name: len(wanted) + index for index, name in enumerate(hold or {})},
                **(extra or {}),
            }
            result, received = await self._finish(key, argv, arguments, tuple(packet_fds), kept)
            outcome = _outcome(result, received, captured(stderr) if stderr >= 0 else "")
            if not kept:
                self.forget(key)
            return outcome
        finally:
            if stderr >= 0:
                os.close(stderr)

    async def join(self, key: str) -> Outcome | None:
        """The outcome of a call an earlier agent made, when it has ended; None if there is no such call."""
        try:
            result, received = await self._supervisor.request("join", {"call": key})
        except SupervisorError:
            return None
        return _outcome(result, received, "")

    def cancel(self, key: str) -> None:
        """Kills a call that an earlier agent made."""
        self._supervisor.tell("cancel", {"call": key})

    def forget(self, key: str) -> None:
        """Also while it runs: it is forgotten then when it has ended."""
        self._supervisor.tell("forget_call", {"call": key})

    async def _finish(
        self, key: str, argv: list[str], arguments: dict[str, Any], fds: tuple[int, ...], kept: bool
    ) -> tuple[Any, list[int]]:
        future = self._supervisor.request("spawn", arguments, fds)
        try:
            return await asyncio.shield(future)
        except SupervisorError as error:
            raise CannotStart(argv[0], str(error), error.errno) from error
        except asyncio.CancelledError:
            self._supervisor.tell("cancel", {"call": key})
            future.add_done_callback(functools.partial(self._discard, "" if kept else key))
            await asyncio.wait([future], timeout=SETTLE_SECONDS)
            raise

    def _discard(self, key: str, future: asyncio.Future[tuple[Any, list[int]]]) -> None:
        """The result of a cancelled call: a process it had started by then is nobody's, and ends."""
        if future.cancelled() or future.exception() is not None:
            return
        for fd in future.result()[1]:
            kill_and_close(fd)
        if key:
            self.forget(key)


def _outcome(result: dict[str, Any], received: list[int], stderr: str) -> Outcome:
    return Outcome(
        status=os.waitstatus_to_exitcode(result["status"]),
        timed_out=result["timed_out"],
        stderr=stderr,
        pid=result["pid"],
        pid_error=result.get("pid_error", ""),
        exit=result.get("exit"),
        pidfd=received[0] if received else None,
    )


def end_launched(outcome: Outcome | None) -> None:
    """The process of a launch that failed all the same."""
    if outcome is not None and outcome.pidfd is not None:
        kill_and_close(outcome.pidfd)


def kill_and_close(pidfd: int) -> None:
    """Ends a process that nobody is going to be told of."""
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it was faster
    finally:
        os.close(pidfd)


def capture(name: str, size: int = CAPTURE) -> int:
    """A file in memory for a program to write its output to, which cannot grow beyond ``size`` bytes."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    return fd


def captured(fd: int) -> str:
    """The end of what was written: the position is the writer's, who has a duplicate of this descriptor."""
    size = os.lseek(fd, 0, os.SEEK_CUR)
    return os.pread(fd, min(size, TAIL), max(0, size - TAIL)).decode(errors="replace").strip()
