"""container.stats: what a container uses, read from its cgroup's files, v2 or v1, under the same names.

Files and units are those of the kernel's Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/*.rst and
accounting/psi.rst. A file that is not there, or says something unknown, leaves its fields None.
"""

from __future__ import annotations

import contextlib
import time

from gcsagent.agent.call import Call
from gcsagent.agent.cgroups import Cgroup
from gcsagent.agent.io_limits import read_table
from gcsagent.agent.limit_files import FILES
from gcsagent.agent.registry import Registry
from protocol.families.container import ContainerRef
from protocol.usage import (
    ContainerStats,
    CpuStats,
    DeviceIo,
    IoLimit,
    IoStats,
    MemoryStats,
    PidsStats,
    Pressure,
)

NO_LIMIT = 1 << 62
"""From here on a v1 memory limit means none: the kernel shows the largest number of whole pages."""


class StatsService:
    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def stats(self, params: ContainerRef, _call: Call) -> ContainerStats:
        container = self._registry.get(params.container)
        container.check("read the statistics of")
        return read_stats(container.ident, container.cgroup)


def read_stats(container: str, cgroup: Cgroup) -> ContainerStats:
    return ContainerStats(
        container=container,
        time_ns=time.time_ns(),
        memory=_memory(cgroup),
        cpu=_cpu(cgroup),
        pids=PidsStats(_number(cgroup, "pids.current"), _number(cgroup, "pids.max")),
        io=_io(cgroup),
        memory_pressure=_pressure(cgroup, "memory.pressure"),
        cpu_pressure=_pressure(cgroup, "cpu.pressure"),
        io_pressure=_pressure(cgroup, "io.pressure"),
    )


def _memory(cgroup: Cgroup) -> MemoryStats:
    """v1 keeps sums over the cgroups below as ``total_``; v2's numbers are such sums."""
    stat = _pairs(cgroup, "memory.stat")

    def of(name: str, v1: str) -> int | None:
        return stat.get(name) if v1 not in stat else stat[v1]

    current = _number(cgroup, "memory.current", "memory.usage_in_bytes")
    inactive = of("inactive_file", "total_inactive_file")
    limit = _limit(cgroup, "memory.max", "memory.limit_in_bytes")
    return MemoryStats(
        current=current,
        limit=limit,
        peak=_number(cgroup, "memory.peak", "memory.max_usage_in_bytes"),
        working_set=None if current is None or inactive is None else max(0, current - inactive),
        anon=of("anon", "total_rss"),
        file=of("file", "total_cache"),
        shmem=of("shmem", "total_shmem"),
        mapped=of("file_mapped", "total_mapped_file"),
        kernel=stat.get("kernel", _number(cgroup, "memory.kmem.usage_in_bytes")),
        slab=stat.get("slab"),
        inactive_file=inactive,
        page_faults=of("pgfault", "total_pgfault"),
        major_faults=of("pgmajfault", "total_pgmajfault"),
        swap=stat.get("total_swap", _number(cgroup, "memory.swap.current")),
        swap_limit=_swap_limit(cgroup, limit),
        reservation=_limit(cgroup, "memory.low", "memory.soft_limit_in_bytes") or None,
        oom_kills=cgroup.oom_counts().kills,
    )


def _swap_limit(cgroup: Cgroup, memory: int | None) -> int | None:
    """v1 limits memory and swap together."""
    both = _limit(cgroup, "memory.memsw.limit_in_bytes")
    if both is None:
        return _limit(cgroup, "memory.swap.max")
    return both - memory if memory is not None else None


def _limit(cgroup: Cgroup, *names: str) -> int | None:
    limit = _number(cgroup, *names)
    return None if limit is None or limit >= NO_LIMIT else limit


def _cpu(cgroup: Cgroup) -> CpuStats:
    """On a hybrid host each of the two ``cpu.stat`` has a part of it; the keys do not clash."""
    stat = _pairs(cgroup, "cpu.stat")
    return CpuStats(
        usage_us=_either(stat.get("usage_usec"), _number(cgroup, "cpuacct.usage")),
        user_us=_either(stat.get("user_usec"), _number(cgroup, "cpuacct.usage_user")),
        system_us=_either(stat.get("system_usec"), _number(cgroup, "cpuacct.usage_sys")),
        periods=stat.get("nr_periods"),
        throttled_periods=stat.get("nr_throttled"),
        throttled_us=_either(stat.get("throttled_usec"), stat.get("throttled_time")),
        limit=_cpus(cgroup),
        shares=_number(cgroup, "cpu.shares"),
        weight=_number(cgroup, "cpu.weight"),
        cpuset_cpus=_text(cgroup, "cpuset.cpus"),
        cpuset_mems=_text(cgroup, "cpuset.mems"),
    )


def _cpus(cgroup: Cgroup) -> float | None:
    """v2's ``cpu.max`` is the quota, or ``max``, and the period; v1 has a file for each."""
    text = _text(cgroup, "cpu.max")
    if text is None:
        text = f"{_text(cgroup, 'cpu.cfs_quota_us')} {_text(cgroup, 'cpu.cfs_period_us')}"
    quota, _, period = text.partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None


def _either(micros: int | None, nanos: int | None) -> int | None:
    """In microseconds. v1's nanoseconds first: on a hybrid host it is v1 that accounts."""
    return micros if nanos is None else nanos // 1000


def _io(cgroup: Cgroup) -> IoStats:
    devices = _io_devices(cgroup)
    limits = tuple(IoLimit(device, **values) for device, values in read_table(cgroup).items())
    weight = _io_weight(cgroup)
    if devices is None:
        return IoStats(limits=limits, weight=weight)
    return IoStats(
        read_bytes=sum(each.read_bytes for each in devices),
        write_bytes=sum(each.write_bytes for each in devices),
        reads=sum(each.reads for each in devices),
        writes=sum(each.writes for each in devices),
        devices=devices,
        limits=limits,
        weight=weight,
    )


def _io_weight(cgroup: Cgroup) -> int | None:
    """``100``, or ``default 100`` and lines for devices."""
    for name in FILES["io_weight"]:
        for text in cgroup.read(name):
            words = text.split("\n")[0].split()
            return int(words[-1]) if words and words[-1].isdigit() else None
    return None


def _io_devices(cgroup: Cgroup) -> tuple[DeviceIo, ...] | None:
    found: dict[str, dict[str, int]] = {}
    there = False
    for text in cgroup.read("io.stat"):
        there = True
        for device, *fields in (line.split() for line in text.splitlines() if line.strip()):
            values = dict(field.partition("=")[::2] for field in fields)
            for key, name in _IO_KEYS.items():
                if values.get(key, "").isdigit():
                    found.setdefault(device, {})[name] = int(values[key])
    for file, names in _IO_V1.items():
        for text in cgroup.read(file):
            there = True
            rows = (line.split() for line in text.splitlines())
            for device, operation, count in (row for row in rows if len(row) == 3):
                if operation in names and count.isdigit():
                    found.setdefault(device, {})[names[operation]] = int(count)
    return tuple(DeviceIo(device, **values) for device, values in found.items()) if there else None


_IO_KEYS = {"rbytes": "read_bytes", "wbytes": "write_bytes", "rios": "reads", "wios": "writes"}
_IO_V1 = {
    "blkio.throttle.io_service_bytes_recursive": {"Read": "read_bytes", "Write": "write_bytes"},
    "blkio.throttle.io_serviced_recursive": {"Read": "reads", "Write": "writes"},
}


def _pressure(cgroup: Cgroup, name: str) -> Pressure | None:
    for text in cgroup.read(name):
        found: dict[str, float | int] = {}
        for line in text.splitlines():
            kind, *fields = line.split() or [""]
            if kind in ("some", "full"):
                for field in fields:
                    key, _, value = field.partition("=")
                    with contextlib.suppress(ValueError):
                        if key in ("avg10", "avg60", "avg300"):
                            found[f"{kind}_{key}"] = float(value)
                        elif key == "total":
                            found[f"{kind}_total_us"] = int(value)
        return Pressure(**found)  # type: ignore[arg-type]
    return None


def _pairs(cgroup: Cgroup, name: str) -> dict[str, int]:
    """``KEY NUMBER`` lines, of all hierarchies that have the file."""
    found: dict[str, int] = {}
    for text in cgroup.read(name):
        pairs = (line.split() for line in text.splitlines())
        found |= {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
    return found


def _text(cgroup: Cgroup, name: str) -> str | None:
    texts = cgroup.read(name)
    return texts[0].strip() if texts else None


def _number(cgroup: Cgroup, *names: str) -> int | None:
    """Of the first of these files that is there; ``max`` is None."""
    for name in names:
        for text in cgroup.read(name):
            return int(text) if text.strip().isdigit() else None
    return None
