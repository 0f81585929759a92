"""Directories of processes that a killed agent has left."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gcsagent.agent.found import process_directories
from gcsagent.agent.process_dir import ContainerDir


@pytest.mark.parametrize("where", [".new-p", "4711", "exited/p"])
def test_one_without_its_document_is_half_made_or_half_removed_and_goes(tmp_path: Path, where: str) -> None:
    for name in (where, "815"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "pid").write_text("1")
    (tmp_path / "815" / "process.json").write_text("{}")
    (tmp_path / "exited").mkdir(exist_ok=True)
    assert process_directories(str(tmp_path)) == ["815"]
    assert not (tmp_path / where).exists()
    assert (tmp_path / "815" / "pid").exists()


def test_a_process_that_is_being_deleted_is_gone_with_the_answer_and_back_without(tmp_path: Path) -> None:
    """Killed behind the answer, before it, and over a deletion that nobody can ask for again."""
    directory = ContainerDir(str(tmp_path), "box")
    directory.create()
    for process, request in (("p-1", "answered"), ("p-2", "unanswered"), ("p-3", "")):
        (tmp_path / "box/exited" / process).mkdir()
        (tmp_path / "box/exited" / process / "process.json").write_text("{}")
        directory.doom(process, request)
    directory.settle_doomed(lambda request: request == "answered")
    assert process_directories(directory.path) == ["exited/p-2"]
    assert os.listdir(tmp_path / "box/exited") == ["p-2"]


class Killed(BaseException):
    """Not to be caught: the agent is no more."""


@pytest.mark.parametrize("steps", range(1, 4))
def test_a_removal_cut_off_anywhere_is_through_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    ended = tmp_path / "box" / "exited" / "p"
    ended.mkdir(parents=True)
    for name in ("process.json", "spec.json", "pid"):
        (ended / name).write_text("{}")
    really = os.unlink
    removed: list[str] = []

    def unlink(path: str) -> None:
        if len(removed) == steps:
            raise Killed
        removed.append(path)
        really(path)

    def rmdir(_path: str) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("gcsagent.agent.process_dir.os.unlink", unlink)
        patch.setattr("gcsagent.agent.process_dir.os.rmdir", rmdir)
        with pytest.raises(Killed):
            ContainerDir(str(tmp_path), "box").discard("p", 0)
    assert ended.exists()
    assert process_directories(str(tmp_path / "box")) == []
    assert not ended.exists()
