"""``pod.*``: what containers of one sandbox have together."""

from __future__ import annotations

from typing import Annotated

from protocol import checks
from protocol.dataclass import dataclass
from protocol.method import QUICK, Empty, Method
from protocol.usage import ContainerStats


@dataclass(frozen=True, slots=True)
class PodRef:
    sandbox: checks.Id
    """The pod's sandbox."""


@dataclass(frozen=True, slots=True)
class UpdatePod:
    """New limits for the pod's cgroup; what is absent stays as it is. -1 takes one away."""

    sandbox: checks.Id
    """The pod's sandbox."""
    memory_bytes: Annotated[int, checks.Limit(1 << 20, 1 << 50)] | None = None
    """Memory."""
    cpus: checks.Cpus | None = None
    """CPU time, in CPUs: 0.5 is half of one."""
    cpu_shares: Annotated[int, checks.Between(2, 1 << 18)] | None = None
    """The pod's part of the CPU time when there is not enough; 1024 is the usual one."""
    pids: Annotated[int, checks.Limit(1, 1 << 22)] | None = None
    """Processes and threads."""


METHODS = (
    Method("pod.update", UpdatePod, Empty, QUICK, True, "the kernel has taken all limits"),
    Method("pod.stats", PodRef, ContainerStats, QUICK),
)
