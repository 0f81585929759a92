"""container.stats: what a container uses, read from its cgroup's files, v2 or v1, under the same names.

Files and units are those of the kernel's Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/*.rst and
accounting/psi.rst. A file that is not there, or says something unknown, leaves its fields None.
"""

from __future__ import annotations

import time

from gcsagent.agent.call import Call
from gcsagent.agent.cgroups import Cgroup
from gcsagent.agent.registry import Registry
from protocol.families.container import ContainerRef
from protocol.usage import ContainerStats, CpuStats, IoStats, MemoryStats, PidsStats, Pressure

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
    limit = _number(cgroup, "memory.max", "memory.limit_in_bytes")
    return MemoryStats(
        current=_number(cgroup, "memory.current", "memory.usage_in_bytes"),
        limit=None if limit is None or limit >= NO_LIMIT else limit,
        peak=_number(cgroup, "memory.peak", "memory.max_usage_in_bytes"),
    )


def _cpu(cgroup: Cgroup) -> CpuStats:
    """On a hybrid host each of the two ``cpu.stat`` has a part of it; the keys do not clash."""
    stat: dict[str, int] = {}
    for text in cgroup.read("cpu.stat"):
        pairs = (line.split() for line in text.splitlines())
        stat |= {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
    return CpuStats(
        usage_us=_either(stat.get("usage_usec"), _number(cgroup, "cpuacct.usage")),
        user_us=_either(stat.get("user_usec"), _number(cgroup, "cpuacct.usage_user")),
        system_us=_either(stat.get("system_usec"), _number(cgroup, "cpuacct.usage_sys")),
        periods=stat.get("nr_periods"),
        throttled_periods=stat.get("nr_throttled"),
        throttled_us=_either(stat.get("throttled_usec"), stat.get("throttled_time")),
    )


def _either(micros: int | None, nanos: int | None) -> int | None:
    """In microseconds. v1's nanoseconds first: on a hybrid host it is v1 that accounts."""
    return micros if nanos is None else nanos // 1000


def _io(cgroup: Cgroup) -> IoStats:
    for text in cgroup.read("io.stat"):
        fields = [field.partition("=") for line in text.splitlines() for field in line.split()[1:]]
        sums = {
            key: sum(int(value) for name, _, value in fields if name == key and value.isdigit())
            for key in ("rbytes", "wbytes", "rios", "wios")
        }
        return IoStats(sums["rbytes"], sums["wbytes"], sums["rios"], sums["wios"])
    (read_bytes, write_bytes), (reads, writes) = (
        _v1_io(cgroup, f"blkio.throttle.{name}_recursive") for name in ("io_service_bytes", "io_serviced")
    )
    return IoStats(read_bytes, write_bytes, reads, writes)


def _v1_io(cgroup: Cgroup, name: str) -> tuple[int | None, int | None]:
    """Read and written, over all devices: lines are ``MAJOR:MINOR OPERATION COUNT``, and totals."""
    for text in cgroup.read(name):
        rows = [row for line in text.splitlines() if len(row := line.split()) == 3 and row[2].isdigit()]
        read, written = (
            sum(int(count) for _, operation, count in rows if operation == wanted)
            for wanted in ("Read", "Write")
        )
        return read, written
    return None, None


def _pressure(cgroup: Cgroup, name: str) -> Pressure | None:
    for text in cgroup.read(name):
        averages = {}
        for line in text.splitlines():
            kind, *fields = line.split() or [""]
            values = dict(field.split("=", 1) for field in fields if "=" in field)
            try:
                averages[kind] = float(values["avg10"])
            except (KeyError, ValueError):
                continue
        return Pressure(averages.get("some"), averages.get("full"))
    return None


def _number(cgroup: Cgroup, *names: str) -> int | None:
    """Of the first of these files that is there; ``max`` is None."""
    for name in names:
        for text in cgroup.read(name):
            return int(text) if text.strip().isdigit() else None
    return None
