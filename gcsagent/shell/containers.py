"""Finds a container to open a shell in: in the state directory and /proc, without agent or runtime."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from typing import Any

from gcsagent.common.namespaces import KINDS
from protocol.dataclass import dataclass
from protocol.errors import Code, RpcError

PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
HOME = "/root"  # of uid 0, in whichever image

_PF_EXITING = 0x4
"""linux/sched.h; in the ninth field of /proc/PID/stat (proc_pid_stat(5))."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a shell is to run; :meth:`close` is the holder's to call."""

    env: tuple[str, ...]
    """``NAME=VALUE``."""
    container: str = ""
    pid: int = 0
    """Of the container's init; 0 is the guest itself."""
    pidfd: int = -1
    root: int = -1
    """Its root directory."""
    namespaces: int = 0
    """Flags of those that are not our own."""

    def ends(self) -> bool:
        """Whether the container's init has ended, or is just ending and taking everybody along."""
        if not self.pid:
            return False
        try:
            fields = _stat(self.pid)
        except OSError:
            return True
        return fields[0] in "ZX" or bool(int(fields[6]) & _PF_EXITING)

    def close(self) -> None:
        for fd in (self.pidfd, self.root):
            if fd >= 0:
                os.close(fd)


def guest() -> Place:
    home = HOME if os.path.isdir(HOME) else "/"
    return Place((PATH, f"HOME={home}", "USER=root", "LANG=C.UTF-8"))


def find(state: str, container: str, supervisor: int) -> Place:
    """The place of a container that has an init process, the child of the process ``supervisor``.

    Raises RpcError: NOT_FOUND, FAILED_PRECONDITION.
    """
    directory = os.path.join(state, "containers", container)
    if not os.path.isdir(directory):
        raise RpcError(Code.NOT_FOUND, f"there is no container {container}", field="container")
    try:
        spec = _read_spec(directory)
        pid = _init_pid(directory)
        pidfd = os.pidfd_open(pid)
    except (OSError, ValueError) as error:
        raise _no_init(container) from error
    root = -1
    try:
        if not _is_init(pid, supervisor, str((spec.get("linux") or {}).get("cgroupsPath"))):
            raise ProcessLookupError
        root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        namespaces = _others(pid)
        signal.pidfd_send_signal(pidfd, 0)  # all of this was about the process of the pidfd
    except OSError as error:
        for fd in (pidfd, root):
            if fd >= 0:
                os.close(fd)
        raise _no_init(container) from error
    return Place(_environment(spec), container, pid, pidfd, root, namespaces)


def _no_init(container: str) -> RpcError:
    return RpcError(
        Code.FAILED_PRECONDITION,
        f"container {container} has no init process: it has ended, or is being made or removed",
        field="container",
    )


def _read_spec(directory: str) -> dict[str, Any]:
    with open(os.path.join(directory, "config.json"), encoding="utf-8") as file:
        spec = json.load(file)
    if not isinstance(spec, dict):
        raise ValueError("config.json holds no object")
    return spec


def _init_pid(directory: str) -> int:
    """As agent.process_dir writes it: init.pid stays, the process's own directory moves away when it ends."""
    with open(os.path.join(directory, "init.pid"), encoding="ascii") as file:
        pid = int(file.read())
    if not os.path.isdir(os.path.join(directory, str(pid))):
        raise ProcessLookupError
    return pid


def _is_init(pid: int, supervisor: int, cgroup: str) -> bool:
    """The agent may hang, so that nobody has noted an init's end: another process may have its number now.

    What is a child of the supervisor's and in the container's cgroup is its init, or an exec of it.
    """
    if int(_stat(pid)[1]) != supervisor:
        return False
    with open(f"/proc/{pid}/cgroup", encoding="utf-8") as file:
        paths = [line.rstrip("\n").split(":", 2)[2] for line in file]
    return any(path == cgroup or path.startswith(f"{cgroup}/") for path in paths)


def _stat(pid: int) -> list[str]:
    """From the third field on: state, ppid, pgrp, session, ..."""
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        return file.read().rpartition(")")[2].split()


def _others(pid: int) -> int:
    found = 0
    for name, flag in KINDS.items():
        with contextlib.suppress(FileNotFoundError):  # a kernel without that kind
            if os.stat(f"/proc/{pid}/ns/{name}").st_ino != os.stat(f"/proc/self/ns/{name}").st_ino:
                found |= flag
    return found


def _environment(spec: dict[str, Any]) -> tuple[str, ...]:
    given = [str(each) for each in (spec.get("process") or {}).get("env") or ()]
    names = {each.partition("=")[0] for each in given}
    usual = [each for each in (PATH, f"HOME={HOME}") if each.partition("=")[0] not in names]
    return (*usual, *given)
