"""Statistics from made-up cgroup files: v2, v1, both at once, and rubbish."""

from __future__ import annotations

from pathlib import Path

from gcsagent.agent.cgroup_stats import read_stats
from gcsagent.agent.cgroups import Cgroup, CgroupMounts
from protocol.usage import ContainerStats, CpuStats, IoStats, MemoryStats, PidsStats, Pressure

V2 = {
    "memory.current": "4096\n",
    "memory.max": "max\n",
    "memory.peak": "8192\n",
    "cpu.stat": "usage_usec 70\nuser_usec 40\nsystem_usec 30\n"
    "nr_periods 3\nnr_throttled 2\nthrottled_usec 9\n",
    "pids.current": "2\n",
    "pids.max": "64\n",
    "io.stat": "8:0 rbytes=10 wbytes=20 rios=1 wios=2 dbytes=5\n8:16 rbytes=1 wbytes=2 rios=3 wios=4\n",
    "memory.pressure": "some avg10=1.50 avg60=0.00 total=1\nfull avg10=0.25 avg60=0.00 total=1\n",
    "cpu.pressure": "some avg10=2.00 avg60=0.00 total=1\n",
}
V1 = {
    "memory.usage_in_bytes": "4096\n",
    "memory.limit_in_bytes": "9223372036854771712\n",
    "memory.max_usage_in_bytes": "8192\n",
    "cpuacct.usage": "70999\n",
    "cpuacct.usage_user": "40000\n",
    "cpuacct.usage_sys": "30000\n",
    "cpu.stat": "nr_periods 3\nnr_throttled 2\nthrottled_time 9000\n",
    "pids.current": "2\n",
    "pids.max": "64\n",
    "blkio.throttle.io_service_bytes_recursive": "8:0 Read 10\n8:0 Write 22\n8:16 Read 1\nTotal 33\n",
    "blkio.throttle.io_serviced_recursive": "8:0 Read 4\n8:0 Write 6\nTotal 10\n",
}
WANTED = (
    MemoryStats(4096, None, 8192),
    CpuStats(70, 40, 30, 3, 2, 9),
    PidsStats(2, 64),
    IoStats(11, 22, 4, 6),
)


def stats(root: Path, v2: dict[str, str], v1: dict[str, str]) -> ContainerStats:
    lines = ""
    for name, kind, files in (("unified", "cgroup2", v2), ("all", "cgroup", v1)):
        if files:
            lines += f"cgroup {root}/{name} {kind} rw 0 0\n"
            (root / name / "gcs" / "c").mkdir(parents=True)
        for file, text in files.items():
            (root / name / "gcs" / "c" / file).write_text(text)
    (root / "mounts").write_text(lines)
    return read_stats("c", Cgroup(CgroupMounts(str(root / "mounts")), "/gcs/c"))


def test_v2(tmp_path: Path) -> None:
    found = stats(tmp_path, V2, {})
    assert (found.memory, found.cpu, found.pids, found.io) == WANTED
    assert found.memory_pressure == Pressure(1.5, 0.25)
    assert found.cpu_pressure == Pressure(2.0, None)
    assert found.io_pressure is None


def test_v1_has_the_same_names(tmp_path: Path) -> None:
    found = stats(tmp_path, {}, V1)
    assert (found.memory, found.cpu, found.pids, found.io) == WANTED
    assert found.memory_pressure is None


def test_on_a_hybrid_host_each_hierarchy_says_its_part(tmp_path: Path) -> None:
    unified = {"cpu.stat": "usage_usec 1\nuser_usec 1\nsystem_usec 0\n", "cpu.pressure": V2["cpu.pressure"]}
    found = stats(tmp_path, unified, V1)
    assert (found.memory, found.cpu, found.pids, found.io) == WANTED
    assert found.cpu_pressure == Pressure(2.0, None)


def test_nothing_there_and_rubbish_are_absent(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    found = stats(tmp_path / "empty", {}, {})
    empty = (MemoryStats(), CpuStats(), PidsStats(), IoStats())
    assert (found.memory, found.cpu, found.pids, found.io) == empty
    (tmp_path / "rubbish").mkdir()
    rubbish = dict.fromkeys(set(V2) - {"io.stat"}, "rub=bish avg10=x\n\n")
    found = stats(tmp_path / "rubbish", rubbish, {})
    assert (found.memory, found.cpu, found.pids, found.io) == empty
    assert found.cpu_pressure == Pressure()
