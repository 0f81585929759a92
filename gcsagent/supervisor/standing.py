"""What the supervisor asks of the kernel for itself before it begins: once, by whoever starts it."""

from __future__ import annotations

import os
import resource

from gcsagent.supervisor.log import log
from gcsagent.supervisor.store import MAX_HELD


def keep_descriptors_to_ourselves() -> None:
    """What we were started with is no child's business: a pipe's end in a container would keep it open."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if int(name) > 2:
                os.set_inheritable(int(name), False)
        except OSError:
            continue  # the listing's own


def raise_limits() -> None:
    """As many descriptors as we may have: they are what this program is for.

    The kernel starts PID 1 with a hard limit of 4,096; raising that takes CAP_SYS_RESOURCE.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(hard, 2 * MAX_HELD)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, wanted))
    except (OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def protect_from_oom() -> None:
    """Makes the kernel kill anything else first; containers get their own value set explicitly."""
    try:
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write("-999")
    except OSError as error:
        log("warning", "cannot protect against the OOM killer", error=str(error))


def become_subreaper() -> None:
    """Containers and execs are re-parented to us, not to init. Before the first fork (prctl(2))."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    pr_set_child_subreaper = 36
    if libc.prctl(pr_set_child_subreaper, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
