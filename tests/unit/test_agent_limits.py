"""Limits on made-up cgroup files, v2 and v1: what is written where, and put back."""

from __future__ import annotations

from pathlib import Path

import pytest

from gcsagent.agent import io_limits, limit_files
from gcsagent.agent.cgroups import Cgroup, CgroupMounts
from protocol import checks
from protocol.errors import Code, RpcError


def cgroup_with(root: Path, kind: str, **files: str) -> Cgroup:
    (root / "mounts").write_text(f"cgroup {root}/all {kind} rw 0 0\n")
    directory = root / "all" / "gcs" / "c"
    directory.mkdir(parents=True)
    for name, text in files.items():
        (directory / name.replace("__", ".")).write_text(text)
    return Cgroup(CgroupMounts(str(root / "mounts")), "/gcs/c")


def test_v2_has_one_file_for_all_limits_of_a_device(tmp_path: Path) -> None:
    cgroup = cgroup_with(tmp_path, "cgroup2", io__max="8:0 rbps=max wbps=7 riops=max wiops=max\n")
    wanted = {"8:0": {"read_bps": 5, "write_bps": 0}}
    assert io_limits.before(cgroup, wanted) == {"8:0": {"read_bps": 0, "write_bps": 7}}
    io_limits.write_table(cgroup, wanted)
    assert cgroup.read("io.max") == ["8:0 rbps=5 wbps=max\n"]
    assert io_limits.read_table(cgroup) == {"8:0": {"read_bps": 5}}


def test_v1_has_a_file_for_each_kind(tmp_path: Path) -> None:
    names = [name for _, name in limit_files.IO_FILES.values()]
    cgroup = cgroup_with(tmp_path, "cgroup", **{name.replace(".", "__"): "" for name in names})
    io_limits.write_table(cgroup, {"8:0": {"read_iops": 3, "write_bps": 4}})
    assert [cgroup.read(name)[0] for name in names] == ["", "8:0 4\n", "8:0 3\n", ""]
    assert io_limits.read_table(cgroup) == {"8:0": {"write_bps": 4, "read_iops": 3}}


@pytest.mark.parametrize(
    "name, weight, written",
    [
        ("io.weight", 10, "1\n"),
        ("io.weight", 500, "4950\n"),
        ("io.weight", 1000, "10000\n"),
        ("io.bfq.weight", 500, "500\n"),
        ("blkio.weight", 500, "500\n"),
    ],
)
def test_weights_are_converted_where_the_kernel_counts_otherwise(
    tmp_path: Path, name: str, weight: int, written: str
) -> None:
    cgroup = cgroup_with(tmp_path, "cgroup2", **{name.replace(".", "__"): "default 100\n8:0 50\n"})
    limit_files.write_io_weight(cgroup, weight)
    assert cgroup.read(name) == [written]


def test_what_was_in_force_is_put_back(tmp_path: Path) -> None:
    files = {"memory__max": "4096\n", "pids__max": "max\n", "io__weight": "default 100\n8:0 50\n"}
    cgroup = cgroup_with(tmp_path, "cgroup2", **files)
    before = limit_files.snapshot(cgroup, ["memory_bytes", "pids", "io_weight", "cpus"])
    assert before == {"memory.max": "4096", "pids.max": "max", "io.weight": "default 100"}
    for name in before:
        cgroup.write(name, "1\n")
    limit_files.restore(cgroup, before)
    assert limit_files.snapshot(cgroup, ["memory_bytes", "pids", "io_weight"]) == before


def test_a_limit_without_a_file_is_named(tmp_path: Path) -> None:
    cgroup = cgroup_with(tmp_path, "cgroup2", memory__max="max\n")
    limit_files.require(cgroup, ["memory_bytes"])
    for field, file in (("pids", "pids.max"), ("io", "io.max"), ("memory_swap_bytes", "memory.swap.max")):
        with pytest.raises(RpcError, match=rf"{field}: .*{file}") as caught:
            limit_files.require(cgroup, ["memory_bytes", field])
        assert (caught.value.code, caught.value.details["field"]) == (Code.UNIMPLEMENTED, field)
    with pytest.raises(FileNotFoundError):
        cgroup.write("pids.max", "1\n")


@pytest.mark.parametrize(
    "text, fine",
    [
        ("0", True),
        ("0-2,7", True),
        ("", False),
        ("2-1", False),
        ("a", False),
        ("1,", False),
        ("0-99999", False),
    ],
)
def test_lists_of_cpus(text: str, fine: bool) -> None:
    assert (checks.cpuset(text) is None) is fine
    assert checks.cpu_list("0-2,7") == {0, 1, 2, 7}


@pytest.mark.parametrize(
    "text, fine",
    [("8:0", True), ("/dev/vda", True), ("8", False), ("vda", False), ("8:0:1", False), ("/dev/\0", False)],
)
def test_devices(text: str, fine: bool) -> None:
    assert (checks.device(text) is None) is fine
