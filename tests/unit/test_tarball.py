"""Archives that mean harm, and honest ones: what comes of them in a directory, and what never does."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gcsagent.tarball.attributes import Keep
from gcsagent.tarball.errors import ArchiveError
from gcsagent.tarball.pack import Choice, Packer, made_up
from gcsagent.tarball.source import MAX_HEADER, Source
from gcsagent.tarball.tree import Tree
from gcsagent.tarball.unpack import TEMPORARY, Rules, Tally, Unpacker
from protocol.errors import Code
from tests.cases.image_files import tar

OWN = Keep(owner=False, xattrs=("user.",))
"""These tests may run as anybody."""


def member(name: str, kind: bytes = tarfile.REGTYPE, **more: Any) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.mode = kind, 0o644
    for key, value in more.items():
        setattr(made, key, value)
    return made


def file(name: str, data: bytes = b"data") -> tuple[tarfile.TarInfo, bytes]:
    return member(name), data


def unpack(root: Path, data: bytes, base: str = "", rules: Rules | None = None, **more: Any) -> Tally:
    """In pieces, as a connection would give them."""
    pieces: Iterator[bytes] = (data[at : at + 700] for at in range(0, len(data), 700))
    fd = os.open(root, os.O_PATH | os.O_DIRECTORY)
    try:
        unpacker = Unpacker(Tree(fd, **more), base.split("/") if base else [], rules or Rules(keep=OWN))
        return unpacker.run(Source(lambda: next(pieces, b"")))
    finally:
        os.close(fd)


def pack(root: Path, path: str, choice: Choice | None = None, *, follow: bool = False) -> bytes:
    out = io.BytesIO()
    fd = os.open(root, os.O_PATH | os.O_DIRECTORY)
    try:
        Packer(lambda piece: void(out.write(piece)), choice or Choice()).run(Tree(fd), path, follow=follow)
    finally:
        os.close(fd)
    return out.getvalue()


def void(_value: object) -> None:
    return None


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A root, ``inside``, and what must never change beside it."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("secret")
    (tmp_path / "inside").mkdir()
    return tmp_path


def untouched(world: Path) -> bool:
    """Outside nothing has changed, and inside nothing has a temporary name."""
    outside = world / "outside"
    names = [name for _, directories, files in os.walk(world) for name in (*directories, *files)]
    return (
        sorted(os.listdir(world)) == ["inside", "outside"]
        and os.listdir(outside) == ["secret"]
        and (outside / "secret").read_text() == "secret"
        and os.stat(outside / "secret").st_nlink == 1
        and not [name for name in names if name.startswith(TEMPORARY)]
    )


HOSTILE: dict[str, Callable[[Path], bytes]] = {
    "upwards": lambda world: tar(file("../outside/secret", b"bad")),
    "upwards in the middle": lambda world: tar(file("a/../../outside/secret", b"bad")),
    "a hard link upwards": lambda world: tar(member("x", tarfile.LNKTYPE, linkname="../outside/secret")),
    "a symlink of its own, then through it": lambda world: tar(
        member("way", tarfile.SYMTYPE, linkname=str(world / "outside")), file("way/secret", b"bad")
    ),
    "a relative one": lambda world: tar(
        member("way", tarfile.SYMTYPE, linkname="../outside"), file("way/secret", b"bad")
    ),
    "a directory through one": lambda world: tar(
        member("way", tarfile.SYMTYPE, linkname="/"), member("way", tarfile.DIRTYPE), file("way/x")
    ),
    "a hard link through one": lambda world: tar(
        member("way", tarfile.SYMTYPE, linkname="/"), member("x", tarfile.LNKTYPE, linkname="way/y")
    ),
    "a hard link to one, then through that": lambda world: tar(
        member("way", tarfile.SYMTYPE, linkname="/"),
        member("other", tarfile.LNKTYPE, linkname="way"),
        file("other/secret", b"bad"),
    ),
    "a device": lambda world: tar(member("null", tarfile.CHRTYPE, devmajor=1, devminor=3)),
    "a fifo": lambda world: tar(member("pipe", tarfile.FIFOTYPE)),
    "a kind nobody knows": lambda world: tar(member("x", b"Z")),
    "a file where it all goes": lambda world: tar(file(".", b"bad")),
    "a hard link to where it all goes": lambda world: tar(member("x", tarfile.LNKTYPE, linkname=".")),
    "a name with NUL": lambda world: tar(member("x", pax_headers={"path": "a\0b"})),
    "a thousand directories": lambda world: tar(file("/".join("d" * 1000))),
    "no tar": lambda world: b"GIF89a" + bytes(2000),
    "compressed": lambda world: b"\x1f\x8b\x08\x00" + os.urandom(2000),
    "nothing": lambda world: b"",
    "a header that is too long": lambda world: tar(
        member("x", pax_headers={"comment": "c" * (MAX_HEADER + 1)})
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_is_refused_and_changes_nothing_outside(name: str, world: Path) -> None:
    data = HOSTILE[name](world)
    with pytest.raises(ArchiveError) as caught:
        unpack(world / "inside", data)
    assert caught.value.code is Code.INVALID_ARGUMENT, caught.value
    assert untouched(world)


@pytest.mark.parametrize("target", ["/outside", "../outside", "../../../outside", "a/../../outside"])
def test_a_symlink_that_is_there_leads_around_inside_the_root(target: str, world: Path) -> None:
    (world / "inside" / "way").symlink_to(target)
    (world / "inside" / "a").mkdir()
    with pytest.raises(ArchiveError) as caught:
        unpack(world / "inside", tar(file("way/secret", b"bad")))
    assert caught.value.code is Code.NOT_FOUND
    (world / "inside" / "outside").mkdir()
    unpack(world / "inside", tar(file("way/secret", b"good")))
    assert (world / "inside" / "outside" / "secret").read_bytes() == b"good"
    assert untouched(world)


def test_absolute_names_are_taken_from_the_root(world: Path) -> None:
    name = str(world / "outside" / "secret")
    link = member("/link", tarfile.LNKTYPE, linkname=name)
    unpack(world / "inside", tar(file(name, b"mine"), link))
    assert (world / "inside" / "link").read_bytes() == b"mine"
    assert untouched(world)


def test_where_no_symlink_is_followed_one_that_is_there_is_refused(world: Path) -> None:
    (world / "inside" / "d").mkdir()
    (world / "inside" / "way").symlink_to("d")
    with pytest.raises(ArchiveError) as caught:
        unpack(world / "inside", tar(file("way/x")), follow=False)
    assert (caught.value.code, os.listdir(world / "inside" / "d")) == (Code.FAILED_PRECONDITION, [])


def test_a_file_replaces_a_symlink_and_not_what_it_leads_to(world: Path) -> None:
    (world / "inside" / "x").symlink_to(world / "outside" / "secret")
    unpack(world / "inside", tar(file("x", b"mine")))
    assert not (world / "inside" / "x").is_symlink()
    assert (world / "inside" / "x").read_bytes() == b"mine"
    assert untouched(world)


def test_a_directory_is_never_replaced(world: Path) -> None:
    (world / "inside" / "d").mkdir()
    for each in (file("d"), member("d", tarfile.SYMTYPE, linkname="x")):
        with pytest.raises(ArchiveError) as caught:
            unpack(world / "inside", tar(each))
        assert caught.value.code is Code.FAILED_PRECONDITION
    assert untouched(world)


def test_a_directory_that_is_there_keeps_its_mode_and_a_new_one_gets_its_own(world: Path) -> None:
    (world / "inside" / "old").mkdir(mode=0o711)
    made = [member(name, tarfile.DIRTYPE, mode=0o2750, mtime=1000) for name in ("old", "new")]
    unpack(world / "inside", tar(*made, file("old/x"), file("new/x")))
    old, new = ((world / "inside" / name).stat() for name in ("old", "new"))
    assert stat.S_IMODE(old.st_mode) == 0o711
    assert (stat.S_IMODE(new.st_mode), new.st_mtime) == (0o2750, 1000)


def test_set_id_bits_and_unwanted_attributes_stay_out(world: Path) -> None:
    made = member("x", mode=0o6755, pax_headers={"SCHILY.xattr.security.capability": "x"})
    tally = unpack(world / "inside", tar(made), rules=Rules(keep=Keep(False, False, ("user.",))))
    assert stat.S_IMODE((world / "inside" / "x").stat().st_mode) == 0o755
    assert tally.skipped == 1


# -- cut off --------------------------------------------------------------------------------------

WHOLE = tar(
    member("d", tarfile.DIRTYPE, mode=0o755),
    file("d/one", b"1" * 3000),
    member("d/" + "long" * 60, tarfile.SYMTYPE, linkname="one"),
    file("d/two", b"2" * 1024),
    member("d/three", tarfile.LNKTYPE, linkname="d/two"),
)


@pytest.fixture
def nameless(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With False: as on a file system whose files need a name: open says EISDIR."""
    if not request.param:
        monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY)


END = WHOLE.rindex(b"d/three") + 512


@pytest.mark.parametrize("nameless", [True, False], indirect=True)
@pytest.mark.parametrize("cut", range(0, END, 512))
@pytest.mark.parametrize("beside", [0, 1, 511])
@pytest.mark.usefixtures("nameless")
def test_cut_off_anywhere_nothing_half_is_left(cut: int, beside: int, world: Path) -> None:
    inside = world / "inside"
    (inside / "d").mkdir()
    (inside / "d" / "one").write_bytes(b"old")
    with pytest.raises(ArchiveError):
        unpack(inside, WHOLE[: cut + beside])
    assert (inside / "d" / "one").read_bytes() in (b"old", b"1" * 3000)
    two = inside / "d" / "two"
    assert not two.exists() or two.read_bytes() == b"2" * 1024
    assert untouched(world)


class Broken(Exception):
    """What a source raises that is not the archive's fault."""


@pytest.mark.parametrize("nameless", [True, False], indirect=True)
@pytest.mark.usefixtures("nameless")
def test_temporary_names_are_noted_before_they_are_there_and_until_they_are_gone(world: Path) -> None:
    inside, noted = world / "inside", list[str]()
    (inside / "one").write_text("old")

    def note(path: str) -> None:
        there = [name for name in os.listdir(inside) if name.startswith(TEMPORARY)]
        assert not there, "it was there before it was noted, or is when that is forgotten"
        noted.append(path)

    members = (file("one"), file("two"), member("link", tarfile.SYMTYPE, linkname="one"))
    data = [tar(*members)]
    fd = os.open(inside, os.O_PATH)
    rules = Rules(keep=OWN)
    Unpacker(Tree(fd), [], rules, note=note).run(Source(lambda: data.pop() if data else b""))
    os.close(fd)
    assert noted[-1] == ""
    assert all(path.startswith(TEMPORARY) for path in noted[::2])
    assert sorted(os.listdir(inside)) == ["link", "one", "two"]
    assert (inside / "one").read_text() == "data"


def test_a_connection_that_breaks_leaves_nothing_half(world: Path) -> None:
    pieces = [tar(file("big", b"x" * 100_000))[:50_000]]

    def more() -> bytes:
        if not pieces:
            raise Broken
        return pieces.pop()

    fd = os.open(world / "inside", os.O_PATH)
    with pytest.raises(Broken):
        Unpacker(Tree(fd), [], Rules(keep=OWN)).run(Source(more))
    os.close(fd)
    assert os.listdir(world / "inside") == []


# -- rubbish --------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), min_size=1, max_size=8))
def test_damage_is_an_archive_error_or_harmless(world: Path, damage: list[tuple[int, int]]) -> None:
    data = bytearray(WHOLE)
    for at, value in damage:
        data[at] = value
    with contextlib.suppress(ArchiveError):
        unpack(world / "inside", bytes(data))
    assert untouched(world)


_RECORDS = st.dictionaries(
    st.sampled_from(
        [
            "path",
            "linkpath",
            "size",
            "mtime",
            "uid",
            "hdrcharset",
            "SCHILY.xattr.user.x",
            "GNU.sparse.major",
            "GNU.sparse.minor",
            "GNU.sparse.map",
            "GNU.sparse.size",
            "GNU.sparse.realsize",
            "GNU.sparse.name",
        ]
    ),
    st.one_of(st.text(max_size=20), st.integers().map(str), st.sampled_from(["1", "0", "../x", "/x", "nan"])),
    min_size=1,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_RECORDS, st.binary(max_size=1500))
def test_pax_rubbish_is_an_archive_error_or_harmless(
    world: Path, records: dict[str, str], data: bytes
) -> None:
    made = member("x", pax_headers=records)
    with contextlib.suppress(ArchiveError):
        unpack(world / "inside", tar((made, data)), rules=Rules(keep=OWN, max_bytes=1 << 20))
    assert untouched(world)


# -- bounds ---------------------------------------------------------------------------------------


def test_entries_and_bytes_are_bounded(world: Path) -> None:
    for rules in (Rules(keep=OWN, max_entries=2), Rules(keep=OWN, max_bytes=8)):
        with pytest.raises(ArchiveError) as caught:
            unpack(world / "inside", tar(file("a"), file("b"), file("c")), rules=rules)
        assert caught.value.code is Code.RESOURCE_EXHAUSTED
        assert sorted(os.listdir(world / "inside")) == ["a", "b"]


@pytest.mark.parametrize("size", [-1, -(1 << 63) - 1, 1 << 63])
def test_a_size_no_file_has_makes_no_room_for_others(world: Path, size: int) -> None:
    claim = tar((member("a", pax_headers={"GNU.sparse.size": str(size)}), b""), file("b"))
    with pytest.raises(ArchiveError) as caught:
        unpack(world / "inside", claim, rules=Rules(keep=OWN, max_bytes=1))
    assert caught.value.code is Code.INVALID_ARGUMENT
    assert os.listdir(world / "inside") == []


def test_holes_count_with_their_size(world: Path) -> None:
    headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(1 << 62)}
    claim = tar((member("huge", pax_headers={**headers, "GNU.sparse.name": "huge"}), b"0\n" + bytes(510)))
    with pytest.raises(ArchiveError) as caught:
        unpack(world / "inside", claim, rules=Rules(keep=OWN, max_bytes=1 << 30))
    assert caught.value.code is Code.RESOURCE_EXHAUSTED
    assert os.listdir(world / "inside") == []


@pytest.mark.parametrize(
    "listing", ["1\n-5\n3\n", "1\n0\n9999999\n", "2\n5\n5\n0\n1\n", "1\n0\n-1\n", "99999999999\n", "x\n"]
)
def test_holes_that_contradict_each_other_are_refused(listing: str, world: Path) -> None:
    headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "100"}
    data = listing.encode().ljust(512, b"\0") + b"data"
    with pytest.raises(ArchiveError) as caught:
        unpack(world / "inside", tar((member("x", pax_headers=headers), data)))
    assert (caught.value.code, os.listdir(world / "inside")) == (Code.INVALID_ARGUMENT, [])


# -- there and back -------------------------------------------------------------------------------


def test_a_tree_comes_back_as_it_was(world: Path) -> None:
    source = world / "inside" / "source"
    (source / "sub" / "deep").mkdir(parents=True)
    (source / "new\nline ü \udcff").write_bytes(b"odd")
    (source / "empty").touch()
    (source / "sub" / "twin").write_bytes(b"t" * 70_000)
    os.link(source / "sub" / "twin", source / "sub" / "deep" / "twin")
    (source / "loop").symlink_to("loop")
    with open(source / "holes", "wb") as holes:
        holes.seek(5 << 20)
        holes.write(b"middle")
        holes.truncate(9 << 20)
    (source / "sub").chmod(0o1751)
    os.setxattr(source / "empty", "user.note", b"\xff\x00binary")
    os.utime(source / "empty", ns=(1, 1_234_567_890_123_456_789))
    (world / "inside" / "target").mkdir()
    data = pack(world / "inside", "/source/.")
    assert len(data) < 1 << 20, "the holes have been filled"
    unpack(world / "inside", data, base="target")
    target = world / "inside" / "target"
    for parent, directories, files in os.walk(source):
        for name in (*directories, *files):
            old = Path(parent, name)
            new = target / old.relative_to(source)
            assert new.lstat().st_mode == old.lstat().st_mode
            assert new.lstat().st_mtime_ns == old.lstat().st_mtime_ns
            if old.is_symlink():
                assert os.readlink(new) == os.readlink(old)
            elif old.is_file():
                assert new.read_bytes() == old.read_bytes()
    assert (target / "holes").stat().st_blocks < 1000
    assert (target / "sub" / "twin").samefile(target / "sub" / "deep" / "twin")
    assert os.getxattr(target / "empty", "user.note") == b"\xff\x00binary"


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_each_format_is_read(form: int, world: Path) -> None:
    name = "d/" * 40 + "n" * 60
    unpack(world / "inside", tar(file(name), form=form))
    assert (world / "inside" / name).read_bytes() == b"data"


def test_the_names_of_entries_follow_the_path_asked_for(world: Path) -> None:
    root = world / "inside"
    (root / "a" / "b").mkdir(parents=True)
    (root / "a" / "b" / "f").write_text("f")
    (root / "way").symlink_to("/a/b")

    def names(path: str, **more: Any) -> list[str]:
        with tarfile.open(fileobj=io.BytesIO(pack(root, path, **more))) as archive:
            return archive.getnames()

    assert names("/a/b") == ["b", "b/f"]
    assert names("/a/b/") == ["b", "b/f"]
    assert names("/a/b/.") == [".", "./f"]
    assert names("/a/b/f") == ["f"]
    assert names("/way") == ["way"]
    assert names("/way", follow=True) == ["way", "way/f"]
    assert names("/way/") == ["way", "way/f"]
    assert names("/a/b/../b") == ["b", "b/f"]
    assert names("/")[0] == "."
    for path, code in (("/a/nothing", Code.NOT_FOUND), ("/a/b/f/", Code.FAILED_PRECONDITION)):
        with pytest.raises(ArchiveError) as caught:
            pack(root, path)
        assert caught.value.code is code


def test_made_up_file_systems_are_known_by_their_mounts() -> None:
    lines = "22 28 0:21 / /proc rw,nosuid shared:5 - proc proc rw\n31 28 8:1 / / rw - ext4 /dev/sda1 rw\n"
    lines += "32 28 0:22 / /odd\rna\x0bme\u2028 rw - sysfs sysfs rw\n"
    assert made_up(lines) == {os.makedev(0, 21), os.makedev(0, 22)}
