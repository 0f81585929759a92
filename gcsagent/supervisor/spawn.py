"""Starts one program through posix_spawn(3).

glibc's posix_spawn uses CLONE_VFORK: no page table is copied however large the supervisor is, and an exec
that fails is an OSError here instead of a child that exits 127.
"""

from __future__ import annotations

import fcntl
import os
import signal

_FIRST_SAFE_FD = 64
"""Sources are moved to here or above first, so that no dup2 overwrites one that is still needed."""

_RESET = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
"""A program that is started expects the default of all of them. The interpreter ignores two at its start, and
whoever started us may have had others ignored (nohup(1), a script's job in the background), which a container
would inherit: to a shell a signal that is ignored at its start stays so (sh(1), trap)."""


def spawn(argv: list[str], env: dict[str, str], fds: dict[int, int]) -> int:
    """Starts ``argv[0]`` (a path, or looked up on our own PATH) in a session of its own.

    ``fds`` maps descriptor numbers in the child to ours; 0, 1 and 2 are /dev/null unless named. Nothing
    else is inherited (all our descriptors are close-on-exec). Returns the pid; raises OSError.
    """
    moved: list[int] = []
    try:
        actions: list[tuple[int, int, int]] = []
        wanted = dict(fds)
        missing = [number for number in (0, 1, 2) if number not in wanted]
        if missing:
            null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
            moved.append(null)
            wanted.update(dict.fromkeys(missing, null))
        for number, fd in wanted.items():
            safe = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST_SAFE_FD)
            moved.append(safe)
            actions.append((os.POSIX_SPAWN_DUP2, safe, number))
        return os.posix_spawnp(
            argv[0], argv, env, file_actions=actions, setsid=True, setsigmask=(), setsigdef=_RESET
        )
    finally:
        for fd in moved:
            os.close(fd)


def spawn_watched(argv: list[str], env: dict[str, str], fds: dict[int, int]) -> tuple[int, int]:
    """Likewise; returns the pid and a pidfd. Raises OSError, and leaves nothing but an orphan to reap."""
    pid = spawn(argv, env, fds)
    try:
        return pid, os.pidfd_open(pid)
    except OSError:
        os.kill(pid, signal.SIGKILL)  # its end would go unseen
        raise
