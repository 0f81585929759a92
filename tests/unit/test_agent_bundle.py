"""From what a host asks for to config.json: each fault named by its field, paths, environment, protection."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gcsagent.agent import bundle
from gcsagent.agent.oci.read import MAX_CONFIG
from protocol.errors import Code, RpcError
from protocol.families.container import CreateContainer
from protocol.families.process import Exec
from protocol.types import Stdio, Winsize


def spec(where: Path, /, **changes: Any) -> dict[str, Any]:
    return {
        "ociVersion": "1.0.2",
        "root": {"path": str(where)},
        "process": {"args": ["sh"], "cwd": "/", "env": ["PATH=/bin"]},
        **changes,
    }


def process(where: Path, /, **changes: Any) -> dict[str, Any]:
    return spec(where, process={"args": ["sh"], "cwd": "/", **changes})


def load(made: dict[str, Any]) -> dict[str, Any]:
    return bundle.load(CreateContainer("c", spec=made))


def refused(made: dict[str, Any]) -> RpcError:
    with pytest.raises(RpcError) as caught:
        load(made)
    return caught.value


@pytest.mark.parametrize(
    "changes, field",
    [
        ({"ociVersion": None}, "spec.ociVersion"),
        ({"ociVersion": 1}, "spec.ociVersion"),
        ({"root": None}, "spec.root.path"),
        ({"root": []}, "spec.root.path"),
        ({"root": {}}, "spec.root.path"),
        ({"root": {"path": 1}}, "spec.root.path"),
        ({"root": {"path": "relative"}}, "spec.root.path"),
        ({"root": {"path": ""}}, "spec.root.path"),
        ({"process": None}, "spec.process"),
        ({"process": []}, "spec.process"),
        ({"linux": []}, "spec.linux"),
        ({"process": {}}, "spec.process.args"),
        ({"process": {"args": "sh"}}, "spec.process.args"),
        ({"process": {"args": []}}, "spec.process.args"),
        ({"process": {"args": [""]}}, "spec.process.args"),
        ({"process": {"args": ["sh", 1]}}, "spec.process.args[1]"),
        ({"process": {"args": ["sh", "a\0b"]}}, "spec.process.args[1]"),
        ({"process": {"args": ["sh"], "cwd": "bin"}}, "spec.process.cwd"),
        ({"process": {"args": ["sh"], "cwd": 1}}, "spec.process.cwd"),
        ({"process": {"args": ["sh"], "cwd": "/a\0"}}, "spec.process.cwd"),
        ({"process": {"args": ["sh"], "env": "A=1"}}, "spec.process.env"),
        ({"process": {"args": ["sh"], "env": ["A=1", "B"]}}, "spec.process.env[1]"),
        ({"process": {"args": ["sh"], "env": ["=x"]}}, "spec.process.env[0]"),
        ({"mounts": [{"type": "bind", "source": "data"}]}, "spec.mounts[0].source"),
    ],
)
def test_a_spec_that_cannot_be_used_names_the_field(
    tmp_path: Path, changes: dict[str, Any], field: str
) -> None:
    error = refused(spec(tmp_path, **changes))
    assert error.code is Code.INVALID_ARGUMENT
    assert error.details["field"] == field
    assert field in error.message


@pytest.mark.parametrize("path", ["missing", "file", "a\0b"])
def test_a_root_that_is_not_there_is_not_found(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").touch()
    error = refused(spec(tmp_path, root={"path": f"{tmp_path}/{path}"}))
    assert (error.code, error.details["field"]) == (Code.NOT_FOUND, "spec.root.path")


def test_exactly_one_of_spec_and_bundle(tmp_path: Path) -> None:
    for params in (
        CreateContainer("c"),
        CreateContainer("c", spec=spec(tmp_path), bundle=str(tmp_path)),
    ):
        with pytest.raises(RpcError, match="exactly one"):
            bundle.load(params)


def test_the_callers_spec_is_not_changed(tmp_path: Path) -> None:
    mine = spec(tmp_path)
    before = json.dumps(mine)
    bundle.finish(load(mine), Stdio(), "/gcs/c")
    assert json.dumps(mine) == before


def test_a_bundles_relative_paths_are_its_own_and_its_file_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "rootfs").mkdir()
    for place in (tmp_path, tmp_path.parent):
        (place / "data").mkdir(exist_ok=True)
    mounts = [
        {"type": "bind", "source": "data", "destination": "/a"},
        {"type": "none", "source": "data", "destination": "/b", "options": ["rbind", "ro"]},
        {"source": "../data", "destination": "/c", "options": ["bind"]},
        {"type": "tmpfs", "source": "tmpfs", "destination": "/d", "options": ["nosuid"]},
        {"type": "bind", "source": "/etc", "destination": "/e"},
    ]
    text = json.dumps(spec(tmp_path, root={"path": "rootfs"}, mounts=mounts))
    (tmp_path / "config.json").write_text(text)
    loaded = bundle.load(CreateContainer("c", bundle=str(tmp_path)))
    assert loaded["root"]["path"] == f"{tmp_path}/rootfs"
    assert [mount["source"] for mount in loaded["mounts"]] == [
        f"{tmp_path}/data",
        f"{tmp_path}/data",
        f"{tmp_path.parent}/data",
        "tmpfs",
        "/etc",
    ]
    assert (tmp_path / "config.json").read_text() == text


@pytest.mark.parametrize(
    "content, says",
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[]", "is not a JSON object"),
        ("[" * 100_000, "is not JSON"),
        ("\udcff", "is not JSON"),
        (" " * (MAX_CONFIG + 1), "is larger than"),
    ],
    ids=["empty", "cut", "array", "deep", "no UTF-8", "large"],
)
def test_a_bundle_that_cannot_be_read_says_why(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "config.json").write_text(content, errors="surrogateescape")
    with pytest.raises(RpcError, match=says) as caught:
        bundle.load(CreateContainer("c", bundle=str(tmp_path)))
    assert caught.value.details["field"] == "bundle"
    assert caught.value.code is Code.INVALID_ARGUMENT


def test_a_bundle_that_is_not_there_or_is_a_directory(tmp_path: Path) -> None:
    with pytest.raises(RpcError, match="does not exist in the guest") as caught:
        bundle.load(CreateContainer("c", bundle=str(tmp_path)))
    assert caught.value.code is Code.NOT_FOUND
    (tmp_path / "config.json").mkdir()
    with pytest.raises(RpcError, match="Is a directory"):
        bundle.load(CreateContainer("c", bundle=str(tmp_path)))


@pytest.mark.parametrize("asked, given", [({}, 0), ({"oomScoreAdj": None}, 0), ({"oomScoreAdj": 500}, 500)])
def test_a_container_always_has_an_oom_score_of_its_own(
    tmp_path: Path, asked: dict[str, Any], given: int
) -> None:
    made = bundle.finish(load(process(tmp_path, **asked)), Stdio(), "/gcs/c")
    assert made["process"]["oomScoreAdj"] == given
    assert made["linux"]["cgroupsPath"] == "/gcs/c"


def test_the_terminal_is_the_requests_and_not_the_specs(tmp_path: Path) -> None:
    asked = process(tmp_path, terminal=True, consoleSize={"height": 1, "width": 1})
    plain = bundle.finish(load(asked), Stdio(), "/c")
    assert plain["process"]["terminal"] is False
    assert "consoleSize" not in plain["process"]
    tty = bundle.finish(load(asked), Stdio(terminal=True, winsize=Winsize(50, 100)), "/c")
    assert tty["process"]["consoleSize"] == {"height": 50, "width": 100}
    assert tty["process"]["terminal"] is True


def test_an_exec_is_the_containers_process_with_what_was_asked_put_over_it(tmp_path: Path) -> None:
    container = process(
        tmp_path, env=["PATH=/bin", "A=old", "B=1"], user={"uid": 5, "gid": 6}, noNewPrivileges=True
    )
    made = bundle.for_exec(
        container,
        Exec(
            "c",
            "p",
            {"args": ["id"], "env": ["A=new", "C=x=y", "A=newest"], "cwd": "/tmp", "terminal": True},
        ),
        str(tmp_path),
    )
    assert made["args"] == ["id"]
    assert made["env"] == ["PATH=/bin", "A=newest", "B=1", "C=x=y"]
    assert (made["cwd"], made["user"], made["noNewPrivileges"]) == ("/tmp", {"uid": 5, "gid": 6}, True)
    assert made["terminal"] is False
    assert container["process"]["args"] == ["sh"]
    assert container["process"]["env"] == ["PATH=/bin", "A=old", "B=1"]


@pytest.mark.parametrize(
    "wanted, field",
    [
        ({}, "spec.args"),
        ({"args": []}, "spec.args"),
        ({"args": [1]}, "spec.args[0]"),
        ({"args": ["x"], "cwd": "x"}, "spec.cwd"),
        ({"args": ["x"], "env": ["A"]}, "spec.env[0]"),
        ({"args": ["x"], "env": ["A=1", "=1"]}, "spec.env[1]"),
        ({"args": ["x"], "env": {"A": "1"}}, "spec.env"),
    ],
)
def test_an_exec_that_cannot_be_used_names_the_field(
    tmp_path: Path, wanted: dict[str, Any], field: str
) -> None:
    with pytest.raises(RpcError) as caught:
        bundle.for_exec(process(tmp_path, env=["A=1"]), Exec("c", "p", wanted), str(tmp_path))
    assert (caught.value.code, caught.value.details["field"]) == (Code.INVALID_ARGUMENT, field)


@pytest.mark.parametrize(
    "namespaces, owns",
    [
        ([{"type": "pid"}], True),
        ([{"type": "pid", "path": ""}], True),
        ([{"type": "pid", "path": "/proc/1/ns/pid"}], False),
        ([{"type": "mount"}, "pid"], False),
        ([], False),
    ],
)
def test_who_owns_the_pid_namespace(namespaces: list[Any], owns: bool) -> None:
    assert bundle.owns_pid_namespace({"linux": {"namespaces": namespaces}}) is owns
    assert bundle.owns_pid_namespace({}) is False
