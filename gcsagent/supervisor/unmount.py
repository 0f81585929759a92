"""The last a guest does: whatever still runs is killed, what is mounted unmounted, and all is written out.

An agent that is well has ended and unmounted everything by then. This is for one that was not: last mounted,
first unmounted; what is busy becomes read-only, which writes it out and marks it clean as well. A child does
it, with a limit on its time: a file system whose device or server is gone can keep its caller for ever.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import time

from gcsagent.supervisor.log import log

KILL_SECONDS, UNMOUNT_SECONDS = 5.0, 20.0
MAX_COMPLAINTS = 4096
MOUNTINFO = "/proc/self/mountinfo"

_KERNELS_OWN = frozenset(
    (
        "autofs",
        "bpf",
        "cgroup",
        "cgroup2",
        "configfs",
        "debugfs",
        "devpts",
        "devtmpfs",
        "fusectl",
        "hugetlbfs",
        "mqueue",
        "nsfs",
        "proc",
        "pstore",
        "ramfs",
        "rootfs",
        "securityfs",
        "selinuxfs",
        "sysfs",
        "tmpfs",
        "tracefs",
    )
)
"""File systems with nothing behind them to write to."""

# Each by itself: one that hangs for good is the last, one that fails is not.
_SCRIPT = (
    'for m; do busybox umount "$m" || busybox mount -o remount,ro "$m" || echo "busy: $m"; done; busybox sync'
)
_ESCAPE = re.compile(rb"\\([0-7]{3})")


def mounted(mountinfo: str = MOUNTINFO) -> list[str]:
    """What has something behind it, in the order to unmount it in (proc_pid_mountinfo(5))."""
    with open(mountinfo, "rb") as file:
        lines = [line.rstrip(b"\n").split(b" ") for line in file]
    points = [
        _ESCAPE.sub(lambda octal: bytes([int(octal[1], 8)]), fields[4])
        for fields in lines
        if os.fsdecode(fields[fields.index(b"-") + 1]) not in _KERNELS_OWN
    ]
    return [os.fsdecode(point) for point in reversed(points) if point != b"/"]


def kill_all(seconds: float = KILL_SECONDS) -> None:
    """Kills every process but this one, and waits for them: one left in a container keeps its mounts.

    Only PID 1 may do that, whose machine it is.
    """
    if os.getpid() != 1:
        raise AssertionError("not PID 1: these are other people's processes")
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)
    reap_all(seconds)


def reap_all(seconds: float) -> bool:
    """Whether all children ended in time; to PID 1, every process is one in the end."""
    deadline = time.monotonic() + seconds
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})  # so that none is missed between two looks
    try:
        while True:
            pid, _ = os.waitpid(-1, os.WNOHANG)
            left = deadline - time.monotonic()
            if not pid and (left <= 0 or signal.sigtimedwait({signal.SIGCHLD}, left) is None):
                log("error", "some processes do not end; the machine ends without them", seconds=seconds)
                return False
    except ChildProcessError:
        return True
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})


def unmount_all(busybox: str = "/bin/busybox", seconds: float = UNMOUNT_SECONDS) -> bool:
    """Whether it came to its end in time; raises nothing that would keep a machine from ending."""
    try:
        points = mounted()
        if points:
            log("info", "unmounting what is left", mounts=points)
        words = os.memfd_create("unmount", os.MFD_CLOEXEC)
        said = [(os.POSIX_SPAWN_DUP2, words, number) for number in (1, 2)]
        argv = ["busybox", "sh", "-c", _SCRIPT, "sh", *points]
        pid = os.posix_spawn(busybox, argv, os.environ, file_actions=said)
    except OSError as error:
        log("error", "what is mounted cannot be unmounted", error=str(error))
        os.sync()
        return False
    ended = _ended(pid, seconds)
    if complaints := os.pread(words, MAX_COMPLAINTS, 0):
        log("warning", "unmounting met resistance", said=complaints.decode(errors="replace").splitlines())
    return ended


def _ended(pid: int, seconds: float) -> bool:
    """Waits for a child, which is killed and left alone if that takes too long."""
    fd = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        if poll.poll(seconds * 1000):
            os.waitpid(pid, 0)
            return True
        log("error", "unmounting takes too long; the machine ends without it", seconds=seconds)
        signal.pidfd_send_signal(fd, signal.SIGKILL)
        return False
    finally:
        os.close(fd)
