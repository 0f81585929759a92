"""Records of what a container uses and of the processes in it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MemoryStats:
    """Of a container's cgroup, in bytes."""

    current: int | None = None
    """In use, page cache included."""
    limit: int | None = None
    """What it may use; absent: no limit."""
    peak: int | None = None
    """Most it has used; absent before Linux 5.19 with cgroup v2."""


@dataclass(frozen=True, slots=True)
class CpuStats:
    """Of a container's cgroup. Times in microseconds."""

    usage_us: int | None = None
    """CPU time used."""
    user_us: int | None = None
    """Of it, in user mode."""
    system_us: int | None = None
    """Of it, in the kernel."""
    periods: int | None = None
    """Periods in which a CPU limit was enforced."""
    throttled_periods: int | None = None
    """Of them, those in which the limit was hit."""
    throttled_us: int | None = None
    """For how long it was held back."""


@dataclass(frozen=True, slots=True)
class PidsStats:
    """Processes and threads in a container's cgroup."""

    current: int | None = None
    """There now."""
    limit: int | None = None
    """How many there may be; absent: no limit."""


@dataclass(frozen=True, slots=True)
class IoStats:
    """What a container's cgroup moved to and from block devices, all of them together."""

    read_bytes: int | None = None
    """Read."""
    write_bytes: int | None = None
    """Written."""
    reads: int | None = None
    """Read operations."""
    writes: int | None = None
    """Write operations."""


@dataclass(frozen=True, slots=True)
class Pressure:
    """Pressure stall information: percent of the last ten seconds."""

    some_avg10: float | None = None
    """In which something waited."""
    full_avg10: float | None = None
    """In which everything waited."""


@dataclass(frozen=True, slots=True)
class ContainerStats:
    """What the cgroup of a container says it uses; what the guest's kernel does not say is absent."""

    container: str
    time_ns: int
    """When it was read, since the epoch, by the guest's clock."""
    memory: MemoryStats = MemoryStats()
    """Memory."""
    cpu: CpuStats = CpuStats()
    """CPU time."""
    pids: PidsStats = PidsStats()
    """Processes."""
    io: IoStats = IoStats()
    """Block devices."""
    memory_pressure: Pressure | None = None
    """Waiting for memory; absent without PSI, as in the following."""
    cpu_pressure: Pressure | None = None
    """Waiting for a CPU."""
    io_pressure: Pressure | None = None
    """Waiting for block devices."""


@dataclass(frozen=True, slots=True)
class ContainerProcess:
    """One process in a container, as the kernel has it: proc_pid_stat(5) and proc_pid_status(5)."""

    pid: int
    """In the guest's pid namespace; for showing to people, never for sending signals."""
    ns_pid: int
    """In the container's own pid namespace; 0: it is not in there."""
    ppid: int
    """Its parent's, in the guest's pid namespace; 0 when that is the kernel."""
    uid: int
    """Effective user id, in the guest's user namespace."""
    running: bool
    """It has not ended; one that is paused or waits is running, too."""
    created_by_runtime: bool
    """It is the container's init or an exec, and ``process`` says which; else one of them made it."""
    zombie: bool
    """It has ended and its parent has not taken notice."""
    process: str = ""
    """Its process id; empty: the runtime did not make it."""
    state: str = ""
    """The kernel's letter for what it does: R, S, D, T, t, Z, X or I."""
    command: str = ""
    """Its command line, arguments parted by blanks; where it has none, its name in brackets."""
    threads: int = 0
    """Its threads."""
    started_at_ns: int = 0
    """Since the epoch, by the guest's clock, to the hundredth of a second."""
    cpu_us: int = 0
    """CPU time used, in user mode and in the kernel, in microseconds."""
    rss_bytes: int = 0
    """Memory it has resident, shared with others or not."""
