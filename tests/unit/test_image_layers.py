"""Layers over each other: whiteouts, what replaces what, and what never gets out of the tree."""

from __future__ import annotations

import contextlib
import gzip
import os
import shutil
import stat
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from gcsagent.host.image import images, limits, trees
from gcsagent.host.image.errors import CannotUnpack, Damaged, ImageError, Refused, TooLarge
from gcsagent.host.image.limits import Limits
from tests.cases.image_files import (
    GZIP,
    PLAIN,
    ZSTD,
    Layout,
    directory,
    file,
    hard_link,
    member,
    symlink,
    tar,
)


def quiet(_what: str, _done: int, _size: int) -> None:
    pass


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """What must never change is beside the root that images are unpacked to."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("secret")
    return tmp_path


def unpacked(world: Path, *layers: bytes, limits: Limits | None = None, **more: object) -> Path:
    layout = Layout(world / "layout")
    layout.image(*layers, **more)  # type: ignore[arg-type]
    return root_of(world, layout.root, limits)


def root_of(world: Path, image: Path, limits: Limits | None = None) -> Path:
    root = world / "root"
    root.mkdir()
    with images.opened(str(image), limits or Limits()) as opened:
        trees.unpack(opened, root, limits or Limits(), quiet)
    return root


def contents(root: Path) -> dict[str, str | None]:
    """Files with what is in them, symlinks with where they lead, directories with None."""
    found: dict[str, str | None] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        else:
            found[name] = None if path.is_dir() else path.read_text()
    return found


BASE = (directory("a"), file("a/x", "1"), file("a/y", "1"), directory("a/d"), file("a/d/z", "1"))


@pytest.mark.parametrize(
    "above, expected",
    [
        ([file("a/.wh.x", "")], {"a": None, "a/y": "1", "a/d": None, "a/d/z": "1"}),
        ([file("a/.wh.d", "")], {"a": None, "a/x": "1", "a/y": "1"}),
        ([file(".wh.a", "")], {}),
        ([file(".wh..wh..opq", "")], {}),
        ([file("a/.wh..wh..opq", ""), file("a/n", "2")], {"a": None, "a/n": "2"}),
        ([file("a/n", "2"), file("a/.wh..wh..opq", "")], {"a": None, "a/n": "2"}),
        ([directory("a/d"), file("a/d/n", "2"), file(".wh.a", "")], {"a": None, "a/d": None, "a/d/n": "2"}),
        ([file("a/x", "2"), file("a/.wh.x", ""), file("a/.wh.d", "")], {"a": None, "a/x": "2", "a/y": "1"}),
        ([file("a/.wh.nothing", ""), file("no/where/.wh.x", ""), file("a/x/.wh.y", "")], None),
        ([file("a/.wh..wh.aufs", ""), file(".wh..wh.plnk/1.2", "")], None),
        ([file(".wh.a", ""), file("a", "2")], {"a": "2"}),
        ([file("a", "2")], {"a": "2"}),
        ([file("a", "2"), file("a/.wh.x", ""), file("a/.wh..wh..opq", "")], {"a": "2"}),  # as umoci has it
        ([symlink("a", "b")], {"a": "-> b"}),
        ([directory("a/d"), file(".wh.a", ""), file("a/d/n", "2")], {"a": None, "a/d": None, "a/d/n": "2"}),
        ([directory("a/x"), file("a/x/n", "2"), file("a/.wh.y", ""), file("a/.wh.d", "")],
         {"a": None, "a/x": None, "a/x/n": "2"}),
        ([hard_link("h", "a/x"), file(".wh.a", "")], {"h": "1"}),
    ],
)  # fmt: skip
def test_what_a_layer_does_to_the_one_below(
    world: Path, above: list[tarfile.TarInfo], expected: dict[str, str | None] | None
) -> None:
    plain = {"a": None, "a/d": None, "a/d/z": "1", "a/x": "1", "a/y": "1"}
    root = unpacked(world, tar(*BASE), tar(*above))
    assert contents(root) == dict(sorted((plain if expected is None else expected).items()))


def test_whiteouts_of_a_third_layer_hide_what_the_second_has_made(world: Path) -> None:
    second = tar(file("a/n", "2"), file("a/.wh.x", ""))
    third = tar(file("a/.wh.n", ""), file("a/x", "3"))
    assert contents(unpacked(world, tar(*BASE), second, third))["a/x"] == "3"
    assert not (world / "root" / "a" / "n").exists()


def test_directories_get_what_the_upper_layer_says_of_them(world: Path) -> None:
    """The root, too; and a directory in a layer twice is as it is the second time."""
    again = tar(directory("./", mode=0o711), directory("a", mode=0o700), directory("a", mode=0o1777, mtime=5))
    root = unpacked(world, tar(*BASE), again)
    assert stat.S_IMODE(root.stat().st_mode) == 0o711
    assert (stat.S_IMODE((root / "a").stat().st_mode), (root / "a").stat().st_mtime) == (0o1777, 5)
    assert (root / "a" / "x").read_text() == "1"


def test_names_go_through_symlinks_of_lower_layers_and_stay_in_the_tree(world: Path) -> None:
    """As with docker: /bin that leads to /usr/bin takes what a later layer puts into /bin."""
    first = tar(directory("usr"), directory("usr/bin"), symlink("bin", "usr/bin"), symlink("abs", "/usr/bin"))
    second = tar(file("bin/tool", "2"), file("abs/other", "2"))
    third = tar(file("bin/.wh.other", ""))
    root = unpacked(world, first, second, third)
    links = {"abs": "-> /usr/bin", "bin": "-> usr/bin"}
    assert contents(root) == {**links, "usr": None, "usr/bin": None, "usr/bin/tool": "2"}


def test_an_archive_need_not_say_that_it_ends(world: Path) -> None:
    """umoci leaves the last padding out, and the zeros behind it; the digests say that it is whole."""
    assert contents(unpacked(world, tar(file("a", "data"))[:516], b"")) == {"a": "data"}


def test_the_same_image_makes_the_same_times(world: Path) -> None:
    root = unpacked(world, tar(directory("a", mtime=7), file("a/x", mtime=7)), tar(file("a/.wh.x", "")))
    assert (root.stat().st_mtime, (root / "a").stat().st_mtime) == (0, 7)


def test_owners_devices_and_attributes_are_kept(world: Path) -> None:
    """These tests may run as anybody: somebody who is not root gets none of that, but no error either."""
    xattr = member("x", pax_headers={"SCHILY.xattr.user.note": "kept"})
    device = member("null", tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666)
    root = unpacked(world, tar(file("owned", uid=7, gid=8, mode=0o4755), device, xattr))
    info = (root / "owned").stat()
    if os.geteuid() == 0:
        assert (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)) == (7, 8, 0o4755)
        assert (root / "null").stat().st_rdev == os.makedev(1, 3)
    else:
        assert info.st_uid == os.geteuid()
    assert (root / "x").exists()


# -- what means harm ------------------------------------------------------------------------------

HOSTILE: dict[str, Callable[[Path], list[bytes]]] = {
    "upwards": lambda world: [tar(file("../outside/secret", "bad"))],
    "upwards in the middle": lambda world: [tar(file("a/../../outside/secret", "bad"))],
    "a hard link upwards": lambda world: [tar(hard_link("x", "../outside/secret"))],
    "a whiteout upwards": lambda world: [tar(file("../outside/.wh.secret", ""))],
    "a whiteout of what is above": lambda world: [tar(directory("a")), tar(file("a/.wh...", ""))],
    "a whiteout of itself": lambda world: [tar(directory("a")), tar(file("a/.wh..", ""))],
    "a whiteout of nothing": lambda world: [tar(file(".wh.", ""))],
    "a root that is none": lambda world: [tar(symlink("./", "/"))],
    "a hard link to a directory": lambda world: [tar(directory("a"), hard_link("b", "a"))],
    "a hard link to what is not there": lambda world: [tar(hard_link("b", "a"))],
    "a symlink to outside, then a hard link through it": lambda world: [
        tar(symlink("way", str(world / "outside"))), tar(hard_link("x", "way/secret")),
    ],
    "an unknown kind": lambda world: [tar(member("x", b"V"))],
    "a directory below a file": lambda world: [tar(file("a")), tar(file("a/b"))],
    "a file that is cut off": lambda world: [tar(file("a", "x" * 9000))[:5000]],
    "no tar": lambda world: [b"no tar at all" * 100],
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_layers_are_refused(world: Path, what: str) -> None:
    with pytest.raises((Refused, CannotUnpack)) as caught:
        unpacked(world, *HOSTILE[what](world))
    assert "\n" not in str(caught.value)
    untouched(world)


CONFINED: dict[str, Callable[[Path], list[bytes]]] = {
    "an absolute name": lambda world: [tar(file(f"{world}/outside/secret", "in"))],
    "a symlink to outside": lambda world: [
        tar(symlink("way", str(world / "outside"))), tar(file("way/secret", "in")),
    ],
    "a relative one": lambda world: [
        tar(directory("a"), symlink("a/way", "../../outside")), tar(file("a/way/secret", "in")),
    ],
    "one of the same layer": lambda world: [
        tar(symlink("way", str(world)), file("way/outside/secret", "in")),
    ],
    "a whiteout through one": lambda world: [
        tar(symlink("way", str(world / "outside"))), tar(file("way/.wh.secret", "")),
    ],
    "everything through one": lambda world: [
        tar(symlink("way", str(world / "outside"))), tar(file("way/.wh..wh..opq", "")),
    ],
    "a hard link to the symlink, then through that": lambda world: [
        tar(symlink("way", str(world)), hard_link("other", "way"), file("other/outside/secret", "in")),
    ],
    "a directory in place of the symlink": lambda world: [
        tar(symlink("way", str(world / "outside"))), tar(directory("way"), file("way/secret", "in")),
    ],
}  # fmt: skip


@pytest.mark.parametrize("what", CONFINED)
def test_names_that_would_lead_outside_end_up_inside(world: Path, what: str) -> None:
    with contextlib.suppress(Refused):  # where the tree has no such directory
        unpacked(world, *CONFINED[what](world))
    untouched(world)


def untouched(world: Path) -> None:
    assert sorted(os.listdir(world)) == ["layout", "outside", "root"]
    assert os.listdir(world / "outside") == ["secret"]
    assert (world / "outside" / "secret").read_text() == "secret"
    assert (world / "outside" / "secret").stat().st_nlink == 1


def test_a_bomb_is_not_unpacked(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "FREE_OF_RATIO", 1 << 20)
    with pytest.raises(TooLarge, match="200 times"):
        unpacked(world, tar(file("zeros", "\0" * (8 << 20))))
    assert sum(path.stat().st_size for path in (world / "root").rglob("*")) < 2 << 20


def test_a_bomb_of_holes_is_not_unpacked(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of 1 TiB without a byte in it: as a disk image it would have them all."""
    sparse = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(1 << 40)}
    hole = member("hole", pax_headers=sparse)
    with pytest.raises(TooLarge, match="GCS_IMAGE_MAX_BYTES"):
        unpacked(world, tar((hole, b"0\n".ljust(512, b"\0"))))


def test_who_allows_a_size_gets_it(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "FREE_OF_RATIO", 1 << 20)
    allowed = Limits.from_env({"GCS_IMAGE_MAX_BYTES": str(16 << 20)})
    root = unpacked(world, tar(file("zeros", "\0" * (8 << 20))), limits=allowed)
    assert (root / "zeros").stat().st_size == 8 << 20
    with pytest.raises(ImageError, match="number of bytes"):
        Limits.from_env({"GCS_IMAGE_MAX_BYTES": "lots"})


@pytest.mark.parametrize(
    "allowed",
    [Limits(max_bytes=4000), Limits(max_entries=3), Limits(max_layers=1)],
)
def test_limits_hold_over_all_layers(world: Path, allowed: Limits) -> None:
    with pytest.raises(TooLarge):
        unpacked(world, tar(file("a"), file("b")), tar(file("c"), file("d")), limits=allowed)


# -- bytes that are not what they should be -------------------------------------------------------


def layer_blob(layout: Layout) -> Path:
    """The only one that is packed with gzip."""
    [blob] = [path for path in layout.path("").iterdir() if path.read_bytes()[:2] == b"\x1f\x8b"]
    return blob


def test_every_way_to_pack_a_layer(world: Path) -> None:
    plain = tar(*BASE)
    zstd = subprocess.run(["zstd", "-qc"], input=plain, capture_output=True, check=True, timeout=20).stdout
    two = gzip.compress(plain[:1000]) + gzip.compress(plain[1000:])
    for number, (packed, kind) in enumerate([(plain, PLAIN), (zstd, ZSTD), (two, GZIP)]):
        below = world / str(number)
        below.mkdir()
        assert contents(unpacked(below, plain, packed=[packed], media_type=kind))["a/d/z"] == "1"


@pytest.mark.parametrize("kind", [GZIP, ZSTD, PLAIN])
def test_a_layer_whose_digest_is_wrong_is_refused(world: Path, kind: str) -> None:
    """Bytes that unpack to the same, and are not those that were announced: only the digest tells."""
    layout = Layout(world / "layout")
    plain = tar(*BASE)
    packed = {
        GZIP: gzip.compress(plain),
        ZSTD: subprocess.run(["zstd", "-qc"], input=plain, capture_output=True, check=True).stdout,
        PLAIN: plain,
    }[kind]
    entry = layout.image(plain, packed=[packed], media_type=kind)
    other = plain.replace(b"1", b"2") if kind == PLAIN else packed[:-1] + bytes([packed[-1] ^ 1])
    [blob] = [path for path in (layout.root / "blobs/sha256").iterdir() if path.read_bytes() == packed]
    blob.write_bytes(other)
    assert entry["size"]
    with pytest.raises((Damaged, Refused)):
        root_of(world, layout.root)


def test_a_digest_that_is_wrong_is_told_though_the_contents_are_right(world: Path) -> None:
    layout = Layout(world / "layout")
    plain = tar(*BASE)
    layout.image(plain, packed=[gzip.compress(plain, 1, mtime=1)])
    again = gzip.compress(plain, 1, mtime=2)
    blob = layer_blob(layout)
    blob.write_bytes(again)
    with pytest.raises(Damaged, match="not what its digest says"):
        root_of(world, layout.root)


def test_a_layer_that_is_not_the_configs_is_refused(world: Path) -> None:
    other = tar(file("other"))
    with pytest.raises(Damaged, match="config says"):
        unpacked(world, tar(*BASE), packed=[gzip.compress(other)])


def test_sizes_and_missing_and_damaged_blobs_are_told(world: Path) -> None:
    layout = Layout(world / "layout")
    plain = tar(*BASE)
    layout.image(plain)
    blob = layer_blob(layout)
    whole = blob.read_bytes()
    for data, word in ((whole + b"more", "announces"), (whole[:-9], "announces"), (None, "incomplete")):
        blob.unlink() if data is None else blob.write_bytes(data)
        with pytest.raises(ImageError, match=word):
            root_of(world, layout.root)
        shutil.rmtree(world / "root")
    os.mkfifo(blob)
    with pytest.raises(Damaged, match="is no file"):
        root_of(world, layout.root)
    shutil.rmtree(world / "root")
    blob.unlink()
    (world / "elsewhere").write_bytes(whole)
    blob.symlink_to(world / "elsewhere")
    with pytest.raises(Damaged, match="symlink"):
        root_of(world, layout.root)


@pytest.mark.parametrize(
    "packed, kind",
    [(b"\x1f\x8b\x08rubbish", GZIP), (gzip.compress(tar(*BASE))[:-12], GZIP), (b"rubbish", ZSTD)],
)
def test_damaged_compression_is_told(world: Path, packed: bytes, kind: str) -> None:
    with pytest.raises(Damaged, match=r"damaged|zstd cannot"):
        unpacked(world, tar(*BASE), packed=[packed], media_type=kind)


def test_without_zstd_its_layers_are_refused(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(world))
    with pytest.raises(CannotUnpack, match="install it"):
        unpacked(world, tar(*BASE), packed=[b"x"], media_type=ZSTD)
