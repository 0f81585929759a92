"""Processes that a failed exec has left in a container: nobody knows their pid.

A runtime that is killed by its deadline, or fails, between starting a process and writing its pid file
leaves one that runs on. It can be told from all others in the container's cgroup: the runtime gave it
away, so the supervisor is its parent (in a pid namespace of its own the container's orphans go to init),
it leads the session that the runtime made for it, and neither a process of ours nor a pid file names it.
"""

from __future__ import annotations

import logging
import os
import signal

from gcsagent.agent import proc
from gcsagent.agent.cgroups import signal_all
from gcsagent.agent.container import Container
from gcsagent.agent.logs import context
from gcsagent.agent.process import Process

_log = logging.getLogger("agent.strays")


def kill_strays(container: Container, failed: Process) -> None:
    """Does nothing where the container shares a pid namespace: its own orphans would look the same."""
    if not container.owns_pids:
        return
    supervisor = os.getppid()
    candidates = {pid for pid in container.cgroup.pids() if _parent_and_session(pid) == (supervisor, pid)}
    # Behind the list: a launch under way writes its pid file before the runtime ends and gives it away.
    strays = (
        candidates - {process.pid for process in container.processes.values()} - _named(container, failed)
    )
    if strays:
        context(_log, container=container.ident).warning(
            "processes of a failed exec are killed", extra={"pids": sorted(strays)}
        )
        signal_all(strays, signal.SIGKILL)


def _parent_and_session(pid: int) -> tuple[int, int]:
    """(0, 0) when there is no such process any more."""
    try:
        found = proc.stat(pid)
    except (FileNotFoundError, ProcessLookupError):
        return 0, 0
    return found.ppid, found.session


def _named(container: Container, failed: Process) -> set[int]:
    """What the pid files of the other launches under way say."""
    found = set()
    for name in os.listdir(container.directory.path):
        if name.startswith(".new-") and name != f".new-{failed.ident}":
            try:
                with open(os.path.join(container.directory.path, name, "pid"), encoding="ascii") as file:
                    found.add(int(file.read(32)))
            except (OSError, ValueError):
                continue
    return found
