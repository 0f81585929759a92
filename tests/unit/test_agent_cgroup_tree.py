"""Where containers' cgroups are, and that nothing outside the agent's own is ever touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gcsagent.agent.cgroup_tree import CgroupTree, overlap
from gcsagent.agent.cgroups import CgroupMounts
from gcsagent.agent.oci import cgroup_path
from gcsagent.agent.process_dir import ContainerDir
from protocol.errors import Code, RpcError


def tree(where: Path, *paths: str) -> CgroupTree:
    (where / "mounts").write_text(
        f"c {where}/unified cgroup2 rw 0 0\nc {where}/pids cgroup rw,pids 0 0\n", encoding="ascii"
    )
    for path in paths:
        for hierarchy in ("unified", "pids"):
            (where / hierarchy / path).mkdir(parents=True, exist_ok=True)
    return CgroupTree(CgroupMounts(str(where / "mounts")), "/gcs")


def wanted(path: Any) -> str:
    return cgroup_path.wanted({"linux": {"cgroupsPath": path}})


@pytest.mark.parametrize(
    "path, placed",
    [
        (None, ""),
        ("", ""),
        ("pods/p1/c1", "pods/p1/c1"),
        ("/pods//p1/./c1/", "pods/p1/c1"),
        ("/user.slice/x", "user.slice/x"),
        ("a:b", "a:b"),
        ("/x/a:b:c", "x/a:b:c"),
    ],
)
def test_a_path_is_placed_below_our_own(path: Any, placed: str) -> None:
    assert wanted(path) == placed
    assert cgroup_path.wanted({}) == cgroup_path.wanted({"linux": None}) == ""


@pytest.mark.parametrize(
    "path",
    ["..", "/a/../../b", "/", "./", "system.slice:runc:c1", "a/b\nc", "x" * 256, "a/" * 17, "a/cgroup.procs"],
)
def test_a_path_that_leads_elsewhere_is_refused(path: str) -> None:
    with pytest.raises(RpcError) as caught:
        wanted(path)
    assert caught.value.code is Code.INVALID_ARGUMENT
    assert caught.value.details["field"] == "spec.linux.cgroupsPath"


@pytest.mark.parametrize(
    "one, other, together",
    [
        ("/gcs/a", "/gcs/a", True),
        ("/gcs/a", "/gcs/a/b", True),
        ("/gcs/a/b", "/gcs/a", True),
        ("/gcs/a", "/gcs/ab", False),
        ("/gcs/a/b", "/gcs/a/c", False),
    ],
)
def test_overlapping_is_being_one_or_inside(one: str, other: str, together: bool) -> None:
    assert overlap(one, other) is together


def test_unknown_ones_are_found_beside_nested_known_ones(tmp_path: Path) -> None:
    made = tree(
        tmp_path, "gcs/c1", "gcs/pods/p1/c2/own", "gcs/pods/p1/c3", "gcs/pods/p2", "gcs/old/x", "other/y"
    )
    known = {"/gcs/c1", "/gcs/pods/p1/c2"}
    found = [cgroup.path for cgroup in made.unknown(known)]
    assert found == ["/gcs/old", "/gcs/pods/p1/c3", "/gcs/pods/p2"]


def test_empty_parents_go_and_others_stay(tmp_path: Path) -> None:
    made = tree(tmp_path, "gcs/pods/p1/c1", "gcs/pods/p2", "other")
    made.at("pods/p1/c1").remove()
    made.prune("/gcs/pods/p1/c1", {"/gcs/pods/p1/soon"})
    assert (tmp_path / "pids/gcs/pods/p1").is_dir()
    made.prune("/gcs/pods/p1/c1", {"/gcs/pods/p11"})
    for hierarchy in ("pids", "unified"):
        left = sorted(
            str(path.relative_to(tmp_path / hierarchy)) for path in (tmp_path / hierarchy).rglob("*")
        )
        assert left == ["gcs", "gcs/pods", "gcs/pods/p2", "other"]
    (tmp_path / "pids/gcs/pods/p2").rmdir()
    (tmp_path / "unified/gcs/pods/p2").rmdir()
    made.prune("/gcs/pods/p2", set())
    assert (tmp_path / "pids/gcs").is_dir()
    assert not (tmp_path / "pids/gcs/pods").exists()


@pytest.mark.parametrize(
    "path", ["/", "/gcs", "/gcs/", "/gcsx/c", "/other", "/gcs/../x", "/gcs/a//b", "gcs/a"]
)
def test_what_was_written_down_is_taken_only_from_below_our_own(tmp_path: Path, path: str) -> None:
    with pytest.raises(ValueError, match="is not below /gcs"):
        tree(tmp_path).restored(path)


def test_a_broken_containers_cgroup_is_found_by_what_can_be_read(tmp_path: Path) -> None:
    made, directory = tree(tmp_path), ContainerDir(str(tmp_path), "c")
    directory.create()
    assert made.recovered(directory) is None
    directory.write("config.json", {"linux": {"cgroupsPath": "/gcs/pods/c"}})
    (tmp_path / "c/container.json").write_text("rubbish")
    found = made.recovered(directory)
    assert found is not None
    assert found.path == "/gcs/pods/c"
    directory.write("container.json", {"cgroup": "/gcs/x"})
    found = made.recovered(directory)
    assert found is not None
    assert found.path == "/gcs/x"
