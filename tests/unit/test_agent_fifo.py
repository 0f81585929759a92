"""Fifos as files: found, made, claimed together, removed; whatever is in their way."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from gcsagent.agent import fifo
from gcsagent.agent.fifo import Fifo
from protocol.errors import Code, RpcError


def claim(path: Path, *known: Fifo) -> tuple[list[Fifo], int]:
    """What was written down, and the mode of what was found."""
    records: list[Fifo] = []
    fd = fifo.claim(
        "f",
        str(path),
        fifo.temporary_name(str(path), "me"),
        lambda found: any(each.same_file(found) for each in known),
        records.append,
    )
    mode = os.fstat(fd).st_mode
    os.close(fd)
    return records, mode


def test_one_that_is_missing_is_made_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "x"
    records, mode = claim(path)
    assert stat.S_ISFIFO(mode)
    assert stat.S_IMODE(mode) == 0o600
    assert [each.made for each in records] == [True]
    assert os.listdir(tmp_path) == ["x"]
    fifo.remove(records[-1], fifo.temporary_name(str(path), "me"))
    assert os.listdir(tmp_path) == []
    fifo.remove(records[-1], fifo.temporary_name(str(path), "me"))


def test_one_that_was_there_is_left(tmp_path: Path) -> None:
    path = tmp_path / "x"
    os.mkfifo(path)
    records, _ = claim(path)
    assert records[-1] == Fifo(str(path))
    fifo.remove(records[-1], fifo.temporary_name(str(path), "me"))
    assert path.is_fifo()


def test_the_second_user_is_an_owner_too(tmp_path: Path) -> None:
    (made,), _ = claim(tmp_path / "x")
    (shared,), _ = claim(tmp_path / "x", made)
    assert shared == made


def test_somebody_elses_under_the_same_name_is_left(tmp_path: Path) -> None:
    path = tmp_path / "x"
    (made,), _ = claim(path)
    held = os.open(path, os.O_RDWR)  # so that the inode's number is not used again
    path.unlink()
    os.mkfifo(path)
    fifo.remove(made, fifo.temporary_name(str(path), "me"))
    os.close(held)
    assert path.is_fifo()


def test_what_a_killed_agent_left_half_made_goes(tmp_path: Path) -> None:
    path, temporary = tmp_path / "x", fifo.temporary_name(str(tmp_path / "x"), "me")
    os.mkfifo(temporary)
    fifo.remove(Fifo(str(path)), temporary)
    assert os.listdir(tmp_path) == []
    os.mkfifo(temporary)
    claim(path)
    assert os.listdir(tmp_path) == ["x"]


def test_one_that_appears_meanwhile_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, link = tmp_path / "x", os.link

    def slow(source: str, target: str, **more: bool) -> None:
        os.mkfifo(path)
        link(source, target, **more)

    monkeypatch.setattr(os, "link", slow)
    records, _ = claim(path)
    assert (records[0].made, records[-1].made) == (True, False)
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize(
    "name, code",
    [
        ("file", Code.INVALID_ARGUMENT),
        ("link", Code.INVALID_ARGUMENT),
        ("file/x", Code.INVALID_ARGUMENT),
        ("none/x", Code.NOT_FOUND),
        ("n" * 300, Code.INVALID_ARGUMENT),
    ],
)
def test_what_is_in_the_way_is_named(tmp_path: Path, name: str, code: Code) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(RpcError) as caught:
        claim(tmp_path / name)
    assert (caught.value.code, caught.value.details["field"]) == (code, "f")
    assert sorted(os.listdir(tmp_path)) == ["file", "link", "real"]


@pytest.mark.parametrize("name", ["stdin", "stdout", "fd3"])
def test_opening_waits_for_nobody_and_a_peer_may_go(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x"
    os.mkfifo(path)
    path_fd = os.open(path, os.O_PATH)
    ends = fifo.open_ends(path_fd, name)
    os.close(path_fd)
    if name == "stdin":
        path.write_bytes(b"one")
        path.write_bytes(b"two")
        assert os.read(ends.child, 10) == b"onetwo"
        path.write_bytes(b"three")
        os.close(ends.hold)
        assert [os.read(ends.child, 10) for _ in range(2)] == [b"three", b""]
    else:
        os.write(ends.child, b"kept")
        os.close(ends.child)
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        assert os.read(reader, 10) == (b"kept" if name == "stdout" else b"")
        os.close(reader)
        if ends.hold >= 0:
            os.close(ends.hold)
    if name == "stdin":
        os.close(ends.child)
