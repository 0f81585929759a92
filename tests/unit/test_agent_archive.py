"""Unpacking of code for an upgrade: what is taken, and everything hostile that is not."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from gcsagent.agent import archive, upgrade
from gcsagent.agent.archive import ArchiveError, unpack
from gcsagent.agent.bounds import Bounds
from gcsagent.agent.supervisor_client import SupervisorClient
from gcsagent.agent.upgrade import UpgradeService
from gcsagent.host.upgrade import pack
from protocol.limits import Limits

GOOD = {"gcsagent/__init__.py": b"one", "gcsagent/agent/app.py": b"two", "protocol/__init__.py": b""}


def tar(files: dict[str, bytes], *more: tarfile.TarInfo, prefix: str = "") -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as made:
        for name, data in files.items():
            member = tarfile.TarInfo(prefix + name)
            member.size = len(data)
            made.addfile(member, io.BytesIO(data))
        for member in more:
            made.addfile(member, io.BytesIO(b"x" * member.size))
    return packed.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def directory(name: str) -> tarfile.TarInfo:
    return special(name, tarfile.DIRTYPE)


def unpacked(tmp_path: Path, data: bytes) -> dict[str, bytes]:
    source, target = tmp_path / "upload", tmp_path / "code"
    source.write_bytes(data)
    unpack(str(source), str(target))
    return {
        str(path.relative_to(target)): path.read_bytes() for path in target.rglob("*") if not path.is_dir()
    }


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
@pytest.mark.parametrize("prefix", ["", "./"])
def test_a_tar_of_the_two_packages_is_taken(
    tmp_path: Path, compress: Callable[[bytes], bytes], prefix: str
) -> None:
    data = tar(GOOD, directory(prefix or "gcsagent"), directory(f"{prefix}gcsagent/empty"), prefix=prefix)
    assert unpacked(tmp_path, compress(data)) == GOOD
    assert (tmp_path / "code").stat().st_mode & 0o777 == 0o700


def test_what_the_host_packs_is_what_the_guest_unpacks(tmp_path: Path) -> None:
    for name, data in GOOD.items():
        path = tmp_path / "src" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    assert unpacked(tmp_path, pack(tmp_path / "src")) == GOOD


@pytest.mark.parametrize(
    "extra, says",
    [
        (tarfile.TarInfo("../evil"), "is not below gcsagent or protocol"),
        (tarfile.TarInfo("gcsagent/../../evil"), "is not below"),
        (tarfile.TarInfo("/gcsagent/evil"), "is not below"),
        (tarfile.TarInfo("/etc/evil"), "is not below"),
        (tarfile.TarInfo("evil.py"), "is not below"),
        (special("gcsagent/link", tarfile.SYMTYPE, "/etc"), "neither a plain file nor a directory"),
        (special("gcsagent/hard", tarfile.LNKTYPE, "gcsagent/__init__.py"), "neither a plain file"),
        (special("gcsagent/fifo", tarfile.FIFOTYPE), "neither a plain file"),
        (special("gcsagent/null", tarfile.CHRTYPE), "neither a plain file"),
        (tarfile.TarInfo("gcsagent/__init__.py"), "is in it twice"),
        (tarfile.TarInfo("protocol/__init__.py/below"), "below a file"),
        (directory("protocol/__init__.py"), "below a file"),
    ],
)
def test_what_could_reach_outside_or_is_no_file_is_refused_and_leaves_nothing(
    tmp_path: Path, extra: tarfile.TarInfo, says: str
) -> None:
    with pytest.raises(ArchiveError, match=says):
        unpacked(tmp_path, tar(GOOD, extra))
    assert os.listdir(tmp_path) == ["upload"]
    assert not (tmp_path.parent / "evil").exists()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x1f\x8b",
        b"not a tar at all" * 100,
        tar(GOOD)[:700],
        gzip.compress(tar(GOOD))[:-90],
        gzip.compress(tar(GOOD))[:100],
        tar({name: data for name, data in GOOD.items() if "protocol" not in name}),
        tar({}),
    ],
)
def test_what_is_no_whole_archive_of_an_agent_is_refused_and_leaves_nothing(
    tmp_path: Path, data: bytes
) -> None:
    with pytest.raises(ArchiveError):
        unpacked(tmp_path, data)
    assert os.listdir(tmp_path) == ["upload"]


def test_a_bomb_is_refused_before_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_BYTES", 1000)
    with pytest.raises(ArchiveError, match="more than"):
        unpacked(tmp_path, gzip.compress(tar({**GOOD, "gcsagent/big": b"\0" * 1001})))
    monkeypatch.setattr(archive, "MAX_FILES", 2)
    with pytest.raises(ArchiveError, match="more than"):
        unpacked(tmp_path, tar(GOOD))


def test_what_a_killed_agent_had_begun_to_unpack_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "code.new" / "gcsagent").mkdir(parents=True)
    (tmp_path / "code.new" / "gcsagent" / "__init__.py").write_text("half")
    assert unpacked(tmp_path, tar(GOOD)) == GOOD


def test_archives_nobody_used_give_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "uploads").mkdir()
    for name in ("asked for", "somebody's"):
        (tmp_path / "uploads" / name).touch()
    supervisor = cast(SupervisorClient, SimpleNamespace(topics={}))
    service = UpgradeService(str(tmp_path), 2, supervisor, Bounds(Limits()))
    service.forget_others(str(tmp_path / "uploads" / "asked for"))
    assert len(list((tmp_path / "uploads").iterdir())) == 2
    monkeypatch.setattr(upgrade, "UNTOUCHED_SECONDS", -1.0)
    service.forget_others(str(tmp_path / "uploads" / "asked for"))
    assert [path.name for path in (tmp_path / "uploads").iterdir()] == ["asked for"]
