"""What the agent needs of an OCI runtime, free of any particular one.

:mod:`gcsagent.agent.runc` implements it; :mod:`gcsagent.agent.app` is the only place that chooses.
"""

from __future__ import annotations

import asyncio
import signal
from typing import Any, Protocol

from protocol.dataclass import dataclass, field

MAX_REASON = 1000
"""Characters of the runtime's own words in an error's sentence; its details have more of them."""


class RuntimeFailure(Exception):
    """A runtime call that failed: ``runtime_error`` is the runtime's own last error line.

    ``status`` is its exit status, or minus the signal that killed it. ``str()`` is one line.
    """

    def __init__(
        self, action: str, status: int, runtime_error: str, stderr: str = "", timed_out: bool = False
    ) -> None:
        super().__init__(action, status)
        self.action, self.status, self.timed_out = action, status, timed_out
        self.runtime_error, self.stderr = runtime_error, stderr

    def __str__(self) -> str:
        words = self.runtime_error or self.stderr.strip().rpartition("\n")[2]
        line = " ".join(words.split())[:MAX_REASON]
        if self.timed_out:
            return f"{self.action} passed its deadline and was killed{f' ({line})' if line else ''}"
        return f"{self.action}: {line or _ending(self.status)}"


class RuntimeMissing(RuntimeFailure):
    """The runtime's binary could not be started at all; ``errno`` says why, 0 if the kernel was not asked."""

    def __init__(self, action: str, errno: int, message: str) -> None:
        super().__init__(action, 127, message)
        self.errno = errno

    def __str__(self) -> str:
        return self.runtime_error


class RuntimeInterrupted(asyncio.CancelledError):
    """The request was given up while the runtime was at work, and has been killed; or before that."""

    def __init__(self, problem: str, runtime_error: str = "") -> None:
        super().__init__(problem)
        self.runtime_error = runtime_error


def _ending(status: int) -> str:
    if status >= 0:
        return f"it ended with status {status} and gave no reason"
    try:
        return f"it was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"it was killed by signal {-status}"


@dataclass(frozen=True, slots=True)
class Launch:
    """A process to be started: its descriptors, and where its traces go.

    ``process`` is the key the supervisor claims it by. ``fds`` are those of the child from 0 on, None for
    /dev/null; they are duplicated as they are sent. ``hold`` are further descriptors for the supervisor's
    store. With ``console_name`` the process gets a terminal, whose master is held under that name.
    """

    process: str
    pid_file: str
    fds: tuple[int | None, ...] = (None, None, None)
    hold: dict[str, int] = field(default_factory=dict)
    console_name: str = ""


@dataclass(frozen=True, slots=True)
class Launched:
    """``exit`` is the supervisor's record when the process had already ended by then."""

    pid: int
    pidfd: int | None
    exit: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class CriuOptions:
    """``images`` is the checkpoint's directory, ``work`` the one that gets CRIU's log."""

    images: str
    work: str
    tcp_established: bool = False
    ext_unix_sk: bool = False
    shell_job: bool = False
    file_locks: bool = False


def launch_call(process: str) -> str:
    """The supervisor's name for the call that creates or execs the process with this key."""
    return f"launch/{process}"


def start_call(container: str) -> str:
    return f"start/{container}"


def change_call(container: str) -> str:
    """Of a pause, a resume or an update: there is one at a time."""
    return f"change/{container}"


def checkpoint_call(container: str) -> str:
    return f"checkpoint/{container}"


@dataclass(frozen=True, slots=True)
class RuntimeState:
    """The OCI runtime spec's state of a container; ``created_at_ns`` is what runc and crun add to it."""

    status: str
    pid: int
    bundle: str
    created_at_ns: int


class Runtime(Protocol):
    """Every method raises RuntimeFailure; cancelling one kills the runtime call it made.

    ``timeout`` is in seconds and is enforced by the supervisor, whether or not the agent lives. The
    supervisor remembers a call that succeeded, for those with a name above, until the caller has written
    the result down and forgets the call (calls.Caller).
    """

    name: str
    binary: str

    async def version(self) -> str: ...
    async def features(self) -> dict[str, Any]: ...
    async def create(self, container: str, bundle: str, launch: Launch, timeout: float) -> Launched: ...
    async def start(self, container: str, timeout: float) -> None: ...
    async def exec(self, container: str, process_file: str, launch: Launch, timeout: float) -> Launched: ...
    async def delete(self, container: str, timeout: float) -> None: ...
    async def state(self, container: str, timeout: float) -> RuntimeState: ...
    async def pause(self, container: str, timeout: float) -> None: ...
    async def resume(self, container: str, timeout: float) -> None: ...
    async def update(self, container: str, resources: dict[str, Any], timeout: float) -> None:
        """``resources`` is the OCI spec's ``linux.resources``; what it leaves out stays."""

    def waits_for_start(self, container: str) -> bool:
        """Whether a created container's init still waits for start, whatever start has reported."""

    async def checkpoint(
        self, container: str, options: CriuOptions, timeout: float, *, leave_running: bool
    ) -> None:
        """Remembered by the supervisor, as a start is. What was paused stays so."""

    async def restore(
        self, container: str, bundle: str, options: CriuOptions, launch: Launch, timeout: float
    ) -> Launched: ...
    def leftovers(self) -> set[str]: ...
    def forget_earlier_logs(self) -> None: ...
