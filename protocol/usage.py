"""Records of what a container uses and of the processes in it."""

from __future__ import annotations

from protocol import checks
from protocol.dataclass import dataclass


@dataclass(frozen=True, slots=True)
class MemoryStats:
    """Of a container's cgroup, in bytes."""

    current: int | None = None
    """In use, page cache included."""
    limit: int | None = None
    """What it may use; absent: no limit."""
    peak: int | None = None
    """Most it has used; absent before Linux 5.19 with cgroup v2."""
    working_set: int | None = None
    """`current` without the page cache that was not used lately: what cannot simply be dropped."""
    anon: int | None = None
    """Anonymous memory: heaps, stacks, and what was copied on write."""
    file: int | None = None
    """Page cache, `shmem` included."""
    shmem: int | None = None
    """tmpfs and shared anonymous memory."""
    mapped: int | None = None
    """Files mapped into processes."""
    kernel: int | None = None
    """The kernel's own for it: page tables, stacks, slabs; absent before Linux 5.18 with cgroup v2."""
    slab: int | None = None
    """Of it, slabs; absent with v1."""
    inactive_file: int | None = None
    """Page cache that was not used lately."""
    page_faults: int | None = None
    """Page faults."""
    major_faults: int | None = None
    """Of them, those that took I/O."""
    swap: int | None = None
    """In swap."""
    swap_limit: int | None = None
    """What it may have in swap; absent: no limit, or no swap accounting."""
    reservation: int | None = None
    """What is taken from it last; absent: nothing is kept for it."""
    oom_kills: int = 0
    """Processes the kernel has killed in it for want of memory."""


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
    limit: float | None = None
    """CPUs it may use; absent: no limit."""
    shares: int | None = None
    """Its part of scarce CPU time, with v1."""
    weight: int | None = None
    """The same with v2."""
    cpuset_cpus: str | None = None
    """CPUs it may run on; empty: as its parent."""
    cpuset_mems: str | None = None
    """Memory nodes it may use; empty: as its parent."""


@dataclass(frozen=True, slots=True)
class PidsStats:
    """Processes and threads in a container's cgroup."""

    current: int | None = None
    """There now."""
    limit: int | None = None
    """How many there may be; absent: no limit."""


@dataclass(frozen=True, slots=True)
class IoLimit:
    """Limits for one block device; absent: none (to update: as it is). 0 takes one away."""

    device: checks.Device
    """`MAJOR:MINOR`, or the path of a device in the guest. A whole disk, not a partition."""
    read_bps: checks.Rate | None = None
    """Bytes read in a second."""
    write_bps: checks.Rate | None = None
    """Bytes written in a second."""
    read_iops: checks.Rate | None = None
    """Reads in a second."""
    write_iops: checks.Rate | None = None
    """Writes in a second."""


@dataclass(frozen=True, slots=True)
class DeviceIo:
    """What a container moved to and from one block device."""

    device: str
    """`MAJOR:MINOR`."""
    read_bytes: int = 0
    """Read."""
    write_bytes: int = 0
    """Written."""
    reads: int = 0
    """Read operations."""
    writes: int = 0
    """Write operations."""


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
    devices: tuple[DeviceIo, ...] = ()
    """The same by device."""
    limits: tuple[IoLimit, ...] = ()
    """Limits in force, by device."""
    weight: int | None = None
    """Its part of scarce I/O, as the kernel has it; few kernels do."""


@dataclass(frozen=True, slots=True)
class Pressure:
    """Pressure stall information: percent of the last 10, 60 and 300 seconds, and all of it."""

    some_avg10: float | None = None
    """In which something waited."""
    full_avg10: float | None = None
    """In which everything waited."""
    some_avg60: float | None = None
    """In which something waited."""
    full_avg60: float | None = None
    """In which everything waited."""
    some_avg300: float | None = None
    """In which something waited."""
    full_avg300: float | None = None
    """In which everything waited."""
    some_total_us: int | None = None
    """Microseconds in which something waited, ever."""
    full_total_us: int | None = None
    """Microseconds in which everything waited, ever."""


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


@dataclass(frozen=True, slots=True)
class RuntimeView:
    """A container as the runtime and the kernel have it, asked just now."""

    status: str = ""
    """The runtime's word for it: creating, created, running, paused or stopped; empty: it knows none."""
    pid: int = 0
    """Of init, by the runtime; 0 when it has stopped."""
    bundle: str = ""
    """The directory the runtime was given."""
    created_at_ns: int = 0
    """Since the epoch, by the runtime; 0: it does not say."""
    init_started_at_ns: int = 0
    """When the kernel made init, to the hundredth of a second, which is before its program was started;
    0: it is no more."""
    problem: str = ""
    """The runtime's own words when it does not know the container or cannot tell."""
    differences: tuple[str, ...] = ()
    """In what it disagrees with the agent, a sentence each; empty: in nothing."""
