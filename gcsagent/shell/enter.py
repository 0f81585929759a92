"""What a shell's process does between fork and exec; runs in the child alone, and never returns.

Into a container it goes by setns(2): namespaces first, all at once, then the root directory of its init,
which lies below the mount namespace's own when the runtime could not pivot. A pid namespace is only entered
by children (pid_namespaces(7)): there one process stays behind, waits, and ends as its child did. The child
leads a session of its own, so that a shell in there finds its process group under a number it can see.

The container's cgroup is left alone: a shell is to work in a container that is paused, has too many
processes or no memory left, and must not be what its limits kill.

What there is to report goes through a pipe that exec closes: ``{"pid": N}`` of a child of the one that
stays behind, ``{"errno": N, "step": S}`` of a failure.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import resource
import signal
import termios
from collections.abc import Callable
from typing import NamedTuple, NoReturn

from gcsagent.common import namespaces
from gcsagent.common.namespaces import CLONE_NEWPID

PR_SET_PDEATHSIG = 1
EXIT_FAILED = 127
DESCRIPTORS = 1024
"""The usual soft limit: programs close each descriptor there might be."""

_TERMINALS = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)
"""What a terminal sends to all of its foreground process group."""
_RESET = (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGTERM, signal.SIGCHLD, *_TERMINALS)


class Plan(NamedTuple):
    commands: list[list[str]]
    """The first that is there is executed."""
    env: dict[str, str]
    report: int
    pidfd: int
    root: int
    namespaces: int
    terminal: bool = True
    """Whether what standard input is, is to be the controlling terminal of whoever is executed."""


def enter(plan: Plan) -> NoReturn:
    step = "prepare"
    try:
        _prepare(plan)
        step = "enter the container's namespaces" if plan.namespaces else "prepare"
        attach_to_parent = _parent_death_signal()
        if plan.namespaces:
            _join(plan)
        else:
            os.chdir("/")
            with contextlib.suppress(OSError):
                os.chdir(plan.env["HOME"])
        attach_to_parent()
        if plan.namespaces & CLONE_NEWPID:
            _leave_behind(plan)
            attach_to_parent()
        step = "exec"
        _execute(plan)
    except BaseException as error:
        number = error.errno if isinstance(error, OSError) and error.errno else 0
        _report(plan, {"errno": number, "step": step, "error": str(error)})
    finally:
        os._exit(EXIT_FAILED)


def _prepare(plan: Plan) -> None:
    before = 3
    for fd in (*sorted({plan.report, plan.pidfd, plan.root} - {-1}), 1 << 20):
        os.closerange(before, fd)
        before = fd + 1
    signal.set_wakeup_fd(-1)
    for number in _RESET:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.umask(0o022)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(DESCRIPTORS, hard), hard))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("0")  # inherited: the supervisor is protected
    namespaces.load()  # as long as our own files can be seen


def _parent_death_signal() -> Callable[[], None]:
    """SIGKILL when the parent dies, be it by SIGKILL itself (prctl(2)); forgotten by fork and setuid."""
    import ctypes  # here, where the process is soon another program: the server does without

    libc = ctypes.CDLL(None)

    def call() -> None:
        libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)

    return call


def _join(plan: Plan) -> None:
    namespaces.setns(plan.pidfd, plan.namespaces)
    os.fchdir(plan.root)
    os.chroot(".")
    os.chdir("/")
    with contextlib.suppress(PermissionError):  # a user namespace may deny it (user_namespaces(7))
        os.setgroups([])
    os.setgid(0)
    os.setuid(0)


def _leave_behind(plan: Plan) -> None:
    """Goes on in a child, whose the terminal is then."""
    for number in _TERMINALS:
        signal.signal(number, signal.SIG_IGN)
    if plan.terminal:
        fcntl.ioctl(0, termios.TIOCNOTTY)
    child = os.fork()
    if child:
        _stand_in(plan, child)
    os.setsid()
    if plan.terminal:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    for number in _TERMINALS:
        signal.signal(number, signal.SIG_DFL)


def _stand_in(plan: Plan, child: int) -> NoReturn:
    _report(plan, {"pid": child})
    # On pipes it would be one more reader and writer, and nobody would see when the other has let go.
    os.closerange(3 if plan.terminal else 0, 1 << 20)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        number = os.WTERMSIG(status)
        with contextlib.suppress(OSError):  # SIGKILL
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def _execute(plan: Plan) -> NoReturn:
    for command in plan.commands[:-1]:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            _execute_one(command, plan.env)
    _execute_one(plan.commands[-1], plan.env)


def _execute_one(command: list[str], env: dict[str, str]) -> NoReturn:
    """As execvp(3) looks it up; os.execvpe imports something, and here is nothing any more to import from."""
    if "/" in command[0]:
        os.execve(command[0], command, env)
    problem: OSError = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), command[0])
    for directory in env.get("PATH", "").split(":"):
        try:
            os.execve(f"{directory or '.'}/{command[0]}", command, env)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except PermissionError as error:
            problem = error
    raise problem


def _report(plan: Plan, words: dict[str, object]) -> None:
    with contextlib.suppress(OSError):
        os.write(plan.report, json.dumps(words).encode() + b"\n")
