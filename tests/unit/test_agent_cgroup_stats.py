"""Statistics from made-up cgroup files: v2, v1, both at once, and rubbish."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gcsagent.agent.cgroup_stats import read_stats
from gcsagent.agent.cgroups import Cgroup, CgroupMounts
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

V2 = {
    "memory.current": "4096\n",
    "memory.max": "max\n",
    "memory.peak": "8192\n",
    "memory.low": "2048\n",
    "memory.swap.current": "12\n",
    "memory.swap.max": "4096\n",
    "memory.events": "oom 2\noom_kill 1\n",
    "memory.stat": "anon 100\nfile 3000\nkernel 50\nshmem 10\nfile_mapped 20\nslab 30\n"
    "inactive_file 96\npgfault 7\npgmajfault 3\n",
    "cpu.max": "50000 100000\n",
    "cpu.weight": "39\n",
    "cpuset.cpus": "0-1\n",
    "cpuset.mems": "\n",
    "cpu.stat": "usage_usec 70\nuser_usec 40\nsystem_usec 30\n"
    "nr_periods 3\nnr_throttled 2\nthrottled_usec 9\n",
    "pids.current": "2\n",
    "pids.max": "64\n",
    "io.stat": "8:0 rbytes=10 wbytes=20 rios=1 wios=2 dbytes=5\n8:16 rbytes=1 wbytes=2 rios=3 wios=4\n",
    "io.max": "8:0 rbps=max wbps=1048576 riops=max wiops=70\n",
    "io.weight": "default 100\n8:0 200\n",
    "memory.pressure": "some avg10=1.50 avg60=0.50 avg300=0.10 total=9\nfull avg10=0.25 avg60=0.00 total=1\n",
    "cpu.pressure": "some avg10=2.00 avg60=0.00 total=1\n",
}
V1 = {
    "memory.usage_in_bytes": "4096\n",
    "memory.limit_in_bytes": "9223372036854771712\n",
    "memory.max_usage_in_bytes": "8192\n",
    "memory.soft_limit_in_bytes": "2048\n",
    "memory.memsw.limit_in_bytes": "9223372036854771712\n",
    "memory.kmem.usage_in_bytes": "50\n",
    "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n",
    "memory.stat": "rss 1\ntotal_rss 100\ntotal_cache 3000\ntotal_shmem 10\ntotal_mapped_file 20\n"
    "inactive_file 1\ntotal_inactive_file 96\ntotal_pgfault 7\ntotal_pgmajfault 3\ntotal_swap 12\n",
    "cpu.cfs_quota_us": "50000\n",
    "cpu.cfs_period_us": "100000\n",
    "cpu.shares": "1024\n",
    "cpuset.cpus": "0-1\n",
    "cpuset.mems": "\n",
    "blkio.throttle.write_bps_device": "8:0 1048576\n",
    "blkio.throttle.write_iops_device": "8:0 70\n",
    "cpuacct.usage": "70999\n",
    "cpuacct.usage_user": "40000\n",
    "cpuacct.usage_sys": "30000\n",
    "cpu.stat": "nr_periods 3\nnr_throttled 2\nthrottled_time 9000\n",
    "pids.current": "2\n",
    "pids.max": "64\n",
    "blkio.throttle.io_service_bytes_recursive": "8:0 Read 10\n8:0 Write 22\n8:16 Read 1\nTotal 33\n",
    "blkio.throttle.io_serviced_recursive": "8:0 Read 4\n8:0 Write 6\nTotal 10\n",
}
MEMORY = MemoryStats(
    current=4096,
    limit=None,
    peak=8192,
    working_set=4000,
    anon=100,
    file=3000,
    shmem=10,
    mapped=20,
    kernel=50,
    inactive_file=96,
    page_faults=7,
    major_faults=3,
    swap=12,
    reservation=2048,
    oom_kills=1,
)
CPU = CpuStats(70, 40, 30, 3, 2, 9, limit=0.5, cpuset_cpus="0-1", cpuset_mems="")
PIDS = PidsStats(2, 64)
DEVICES = (DeviceIo("8:0", 10, 20, 1, 2), DeviceIo("8:16", 1, 2, 3, 4))
V1_DEVICES = (DeviceIo("8:0", 10, 22, 4, 6), DeviceIo("8:16", 1))
LIMITS = (IoLimit("8:0", write_bps=1 << 20, write_iops=70),)
V1_WANTED = (MEMORY, replace(CPU, shares=1024), PIDS, IoStats(11, 22, 4, 6, V1_DEVICES, LIMITS))


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
    assert found.memory == replace(MEMORY, swap_limit=4096, slab=30)
    assert found.cpu == replace(CPU, weight=39)
    assert (found.pids, found.io) == (PIDS, IoStats(11, 22, 4, 6, DEVICES, LIMITS, weight=100))
    assert found.memory_pressure == Pressure(1.5, 0.25, 0.5, 0.0, 0.1, None, 9, 1)
    assert found.cpu_pressure == Pressure(2.0, None, 0.0, some_total_us=1)
    assert found.io_pressure is None


def test_v1_has_the_same_names(tmp_path: Path) -> None:
    found = stats(tmp_path, {}, V1)
    assert (found.memory, found.cpu, found.pids, found.io) == V1_WANTED
    assert found.memory_pressure is None


def test_on_a_hybrid_host_each_hierarchy_says_its_part(tmp_path: Path) -> None:
    unified = {"cpu.stat": "usage_usec 1\nuser_usec 1\nsystem_usec 0\n", "cpu.pressure": V2["cpu.pressure"]}
    found = stats(tmp_path, unified, V1)
    assert (found.memory, found.cpu, found.pids, found.io) == V1_WANTED
    assert found.cpu_pressure == Pressure(2.0, None, 0.0, some_total_us=1)


def test_nothing_there_and_rubbish_are_absent(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    found = stats(tmp_path / "empty", {}, {})
    empty = (MemoryStats(), CpuStats(), PidsStats(), IoStats())
    assert (found.memory, found.cpu, found.pids, found.io) == empty
    (tmp_path / "rubbish").mkdir()
    rubbish = dict.fromkeys(
        set(V2) - {"io.stat", "cpuset.cpus", "cpuset.mems", "memory.events"}, "rub=bish avg10=x\n\n"
    )
    found = stats(tmp_path / "rubbish", rubbish, {})
    assert (found.memory, found.cpu, found.pids, found.io) == empty
    assert found.cpu_pressure == Pressure()


def test_v1s_limit_on_swap_is_what_is_beyond_memory(tmp_path: Path) -> None:
    files = {"memory.limit_in_bytes": "4096\n", "memory.memsw.limit_in_bytes": "6144\n"}
    assert stats(tmp_path, {}, files).memory.swap_limit == 2048
