"""Cgroups on a made-up tree: v2, v1, and both at once, found through the mounts file."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from gcsagent.agent import reach
from gcsagent.agent.cgroups import Cgroup, CgroupMounts, OomCounts, signal_all
from gcsagent.agent.kernfs import KernelFiles
from tests.cases.descriptors import descriptors, settled_descriptors


class Tree:
    def __init__(self, root: Path, **kinds: str) -> None:
        """``kinds`` maps the name of each hierarchy to its file system type."""
        self.root, self.kinds = root, kinds
        lines = ["proc /proc proc rw 0 0", f"tmpfs {root} tmpfs rw,size=1k 0 0"]
        for name, kind in kinds.items():
            (root / name).mkdir()
            lines.append(f"cgroup {root}/{name} {kind} rw,nosuid,{name} 0 0")
        mounts = root / "mounts"
        mounts.write_text("\n".join(lines) + "\n")
        self.mounts = CgroupMounts(str(mounts))

    def make(self, hierarchy: str, path: str, **files: str) -> Path:
        directory = self.root / hierarchy / path.lstrip("/")
        directory.mkdir(parents=True)
        for name, text in files.items():
            (directory / name.replace("__", ".")).write_text(text)
        return directory


@pytest.fixture
def sleepers() -> Iterator[list[subprocess.Popen[bytes]]]:
    made = [subprocess.Popen(["sleep", "60"]) for _ in range(3)]
    yield made
    for process in made:
        process.kill()
        process.wait()


def ended(process: subprocess.Popen[bytes]) -> int:
    return process.wait(10)


@pytest.mark.parametrize(
    "kinds, version",
    [
        ({"unified": "cgroup2"}, "v2"),
        ({"memory": "cgroup", "pids": "cgroup"}, "v1"),
        ({"memory": "cgroup", "unified": "cgroup2"}, "hybrid"),
        ({}, "none"),
    ],
)
def test_the_version_is_what_is_mounted(tmp_path: Path, kinds: dict[str, str], version: str) -> None:
    assert Tree(tmp_path, **kinds).mounts.version == version


def test_this_machines_own_mounts_can_be_read() -> None:
    assert CgroupMounts().version in ("v1", "v2", "hybrid", "none")


def test_processes_are_found_wherever_any_are_below_it_too(tmp_path: Path) -> None:
    tree = Tree(tmp_path, memory="cgroup", pids="cgroup", unified="cgroup2")
    tree.make("memory", "/gcs/c", cgroup__procs="10\n11\n")
    tree.make("pids", "/gcs/c", cgroup__procs="11\n12\n")
    tree.make("pids", "/gcs/c/child", cgroup__procs="13\n")
    tree.make("pids", "/gcs/other", cgroup__procs="99\n")
    assert Cgroup(tree.mounts, "/gcs/c").pids() == {10, 11, 12, 13}
    assert Cgroup(tree.mounts, "/gcs/missing").pids() == set()


def test_a_hybrid_machine_uses_each_file_where_it_is(
    tmp_path: Path, sleepers: list[subprocess.Popen[bytes]]
) -> None:
    """The v2 hierarchy exists and has no such cgroup: v1's processes must still be reached."""
    tree = Tree(tmp_path, memory="cgroup", unified="cgroup2")
    tree.make("memory", "/gcs/c", cgroup__procs=f"{sleepers[0].pid}\n", memory__oom_control="oom_kill 2\n")
    cgroup = Cgroup(tree.mounts, "/gcs/c")
    assert not cgroup.kill_at_once()
    asyncio.run(kill(cgroup))
    assert ended(sleepers[0]) == -signal.SIGKILL
    assert cgroup.oom_counts() == OomCounts(2, None)


async def kill(cgroup: Cgroup) -> int:
    return await reach.kill_everybody(cgroup, KernelFiles())


def test_v2_is_killed_by_its_one_file(tmp_path: Path) -> None:
    tree = Tree(tmp_path, unified="cgroup2")
    directory = tree.make("unified", "/gcs/c", cgroup__procs="1\n", cgroup__kill="")
    assert asyncio.run(kill(Cgroup(tree.mounts, "/gcs/c"))) == 1
    assert (directory / "cgroup.kill").read_text() == "1"


def test_v1_is_killed_frozen_and_no_file_is_made(
    tmp_path: Path, sleepers: list[subprocess.Popen[bytes]]
) -> None:
    tree = Tree(tmp_path, freezer="cgroup", pids="cgroup")
    directory = tree.make(
        "freezer", "/gcs/c", cgroup__procs=f"{sleepers[0].pid}\n", freezer__state="THAWED\n"
    )
    tree.make("pids", "/gcs/c/child", cgroup__procs=f"{sleepers[1].pid}\n")
    assert asyncio.run(kill(Cgroup(tree.mounts, "/gcs/c"))) == 2
    assert [ended(process) for process in sleepers[:2]] == [-signal.SIGKILL] * 2
    assert sleepers[2].poll() is None
    assert (directory / "freezer.state").read_text() == "THAWED"
    assert sorted(os.listdir(directory)) == ["cgroup.procs", "freezer.state"]


def test_killing_what_is_not_there_does_nothing(tmp_path: Path) -> None:
    assert asyncio.run(kill(Cgroup(Tree(tmp_path, unified="cgroup2").mounts, "/gcs/c"))) == 0


@pytest.mark.parametrize(
    "kind, files, counts",
    [
        ("cgroup2", {"memory__events": "low 0\noom 3\noom_kill 2\noom_group_kill 0\n"}, OomCounts(2, 3)),
        (
            "cgroup",
            {"memory__oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 7\n"},
            OomCounts(7, None),
        ),
        ("cgroup", {"memory__oom_control": "oom_kill_disable 0\nunder_oom 0\n"}, OomCounts(0, None)),
        ("cgroup2", {"memory__events": "oom_kill rubbish\n"}, OomCounts(0, None)),
        ("cgroup2", {"memory__events": "oom_kill \u00b2\n"}, OomCounts(0, None)),
        ("cgroup2", {}, OomCounts(0, None)),
    ],
)
def test_oom_kills_are_counted_where_the_kernel_counts_them(
    tmp_path: Path, kind: str, files: dict[str, str], counts: OomCounts
) -> None:
    tree = Tree(tmp_path, memory=kind)
    tree.make("memory", "/gcs/c", **files)
    assert Cgroup(tree.mounts, "/gcs/c").oom_counts() == counts


def test_a_limit_above_is_seen(tmp_path: Path) -> None:
    tree = Tree(tmp_path, unified="cgroup2")
    tree.make("unified", "/slice", memory__max="max\n")
    tree.make("unified", "/slice/gcs", memory__max="max\n")
    tree.make("unified", "/slice/gcs/c", memory__max="1000\n")
    cgroup = Cgroup(tree.mounts, "/slice/gcs/c")
    assert not cgroup.limited_above()
    (tmp_path / "unified/slice/memory.max").write_text("2000\n")
    assert cgroup.limited_above()


def test_removal_goes_deepest_first_in_every_hierarchy_and_names_what_resists(tmp_path: Path) -> None:
    tree = Tree(tmp_path, memory="cgroup", pids="cgroup")
    tree.make("memory", "/gcs/c/deep/deeper")
    stuck = tree.make("pids", "/gcs/c/busy", cgroup__procs="")  # a file: this tree's way to be populated
    tree.make("pids", "/gcs/other")
    assert Cgroup(tree.mounts, "/gcs/c").remove() == [str(stuck), str(stuck.parent)]
    assert not (tmp_path / "memory/gcs/c").exists()
    assert (tmp_path / "pids/gcs/other").exists()
    (stuck / "cgroup.procs").unlink()
    assert Cgroup(tree.mounts, "/gcs/c").remove() == []
    assert not (tmp_path / "pids/gcs/c").exists()
    assert Cgroup(tree.mounts, "/gcs/c").remove() == []


def test_signals_reach_the_living_and_pass_over_the_dead(sleepers: list[subprocess.Popen[bytes]]) -> None:
    before = settled_descriptors()
    dead = subprocess.Popen(["true"])
    dead.wait()
    assert signal_all({sleepers[0].pid, sleepers[1].pid, dead.pid}, signal.SIGTERM) == 2
    assert [ended(process) for process in sleepers[:2]] == [-signal.SIGTERM] * 2
    assert descriptors() == before


def test_frozen_is_seen_and_thawed_in_either_kind_and_below(tmp_path: Path) -> None:
    tree = Tree(tmp_path, freezer="cgroup", unified="cgroup2")
    old = tree.make("freezer", "/gcs/c", freezer__state="THAWED\n")
    below = tree.make("freezer", "/gcs/c/inner", freezer__state="FROZEN\n")
    new = tree.make("unified", "/gcs/c", cgroup__freeze="0\n")
    cgroup = Cgroup(tree.mounts, "/gcs/c")
    assert not cgroup.frozen(), "what the container froze itself"
    (old / "freezer.state").write_text("FREEZING\n")
    assert cgroup.frozen()
    cgroup.thaw()
    assert (below / "freezer.state").read_text() == "THAWED"
    assert not cgroup.frozen()
    (new / "cgroup.freeze").write_text("1\n")
    assert cgroup.frozen()
    cgroup.thaw()
    assert (new / "cgroup.freeze").read_text() == "0"
    (old / "freezer.state").write_text("FROZEN\n")
    assert cgroup.is_frozen()
    cgroup.unfreeze()
    assert not cgroup.is_frozen()


def test_nothing_to_thaw_is_not_frozen(tmp_path: Path) -> None:
    cgroup = Cgroup(Tree(tmp_path, unified="cgroup2").mounts, "/gcs/gone")
    cgroup.thaw()
    assert not cgroup.frozen()
