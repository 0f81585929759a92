"""Frees an agent that not even SIGKILL ends: it waits for a pipe's lock, out of any signal's reach.

Whoever is in the kernel with a pipe has its lock, and splice(2) from a socket or a terminal into a pipe keeps
it for as long as nothing comes. Whoever else reads that pipe, or asks what is in it, waits for the lock; so
any process in a container could keep the agent for ever through its own standard output. The lock is free
when that process is killed.

Which pipe it is can be seen by the descriptors of the system calls that the agent's threads are in; whose it
is, by the name under which it is held here, ``fd/PROCESS/STREAM``.
"""

from __future__ import annotations

import os
import signal
import stat

from gcsagent.supervisor.log import log

TYPE_CHECKING = False  # typing itself is half a megabyte
if TYPE_CHECKING:
    from collections.abc import Iterable

    from gcsagent.supervisor.reaper import Reaper

_ARGUMENTS = (1, 3)
"""Words of /proc/PID/syscall (proc_pid_syscall(5)): the first and third argument, where read(2), ioctl(2),
fcntl(2), splice(2) and tee(2) have their descriptors."""


def free(pid: int, held: Iterable[tuple[str, int]], reaper: Reaper, again: bool) -> None:
    """Kills the processes whose pipes ``pid`` is in the kernel with; ``held`` are our descriptors by name.

    Another in that container may have the lock: ``again``, or where the process has ended, all are killed.
    """
    try:
        names = _awaited(pid, held)
    except OSError as error:
        log("error", "an agent does not die, and what it waits for cannot be seen", error=str(error))
        return
    owners = {"/".join(name.split("/")[1:3]) for name in names}
    victims = {key for key in owners if key in reaper.processes}
    if again or not victims:
        containers = {key.partition("/")[0] for key in owners}
        victims = {key for key in reaper.processes if key.partition("/")[0] in containers}
    log(
        "error",
        "an agent does not die: who keeps a pipe from it is killed",
        pipes=names,
        killed=sorted(victims),
    )
    for key in victims:
        signal.pidfd_send_signal(reaper.processes[key].pidfd, signal.SIGKILL)


def _awaited(pid: int, held: Iterable[tuple[str, int]]) -> list[str]:
    """Raises OSError."""
    pipes = set()
    for thread in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{thread}/syscall", encoding="ascii") as file:
            words = file.read().split()  # only "running" of one that does not wait
        for index in _ARGUMENTS:
            if index < len(words) and (found := _pipe(f"/proc/{pid}/fd/{int(words[index], 0)}")):
                pipes.add(found)
    return sorted(name for name, fd in held if pipes and _pipe(f"/proc/self/fd/{fd}") in pipes)


def _pipe(path: str) -> tuple[int, int] | None:
    """Which one it is. Takes no pipe's lock."""
    try:
        info = os.stat(path)
    except OSError:
        return None
    return (info.st_dev, info.st_ino) if stat.S_ISFIFO(info.st_mode) else None
