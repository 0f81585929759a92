"""Which image a PATH[:TAG] means, in each of the formats, and what is refused before anything is unpacked."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gcsagent.host.image import images, reference, settings
from gcsagent.host.image.documents import Config
from gcsagent.host.image.errors import (
    Ambiguous,
    Damaged,
    ImageError,
    NoFile,
    NotFound,
    TooLarge,
    Unsupported,
)
from gcsagent.host.image.images import Image
from gcsagent.host.image.limits import Limits
from tests.cases.image_files import (
    CONFIG as CONFIG_TYPE,
)
from tests.cases.image_files import (
    INDEX,
    MANIFEST,
    PLAIN,
    Layout,
    directory,
    docker_archive,
    file,
    sha256,
    symlink,
    tar,
)

ONE, TWO = tar(file("one")), tar(file("two"))
LIMITS = Limits()


def read(text: object) -> Image:
    with images.opened(str(text), LIMITS) as image:
        return image


def layers(text: object) -> list[str]:
    return [layer.diff_id for layer in read(text).layers]


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "layout")


# -- references -----------------------------------------------------------------------------------


def test_the_longest_path_that_is_there_is_the_path(tmp_path: Path) -> None:
    odd = tmp_path / "a:b"
    odd.mkdir()
    for text, tag in ((f"{odd}", ""), (f"{odd}:1", "1"), (f"oci:{odd}:host:5000/app:1", "host:5000/app:1")):
        assert reference.parse(text) == reference.Reference(odd, tag)
    with pytest.raises(NoFile, match="no such"):
        reference.parse(f"{tmp_path}/nothing:1")


@pytest.mark.parametrize(
    "tag, found", [("1", ONE), ("2", TWO), ("host/app:1", ONE), ("app:1", ONE), ("latest", TWO), ("", TWO)]
)
def test_tags(layout: Layout, tmp_path: Path, tag: str, found: bytes) -> None:
    layout.image(ONE, tag="host/app:1")
    layout.image(TWO, tag="2")
    layout.image(TWO, tag="latest")
    for path in (layout.root, layout.as_tar(tmp_path / "layout.tar")):
        assert layers(f"{path}:{tag}" if tag else path) == [sha256(found)]


def test_what_no_tag_or_a_wrong_one_means_is_told(layout: Layout) -> None:
    with pytest.raises(NotFound, match="no image"):
        read(layout.root)
    layout.image(ONE, tag="1")
    assert layers(layout.root) == [sha256(ONE)]
    layout.image(TWO, tag="2")
    with pytest.raises(Ambiguous, match="TAG, one of: 1, 2"):
        read(layout.root)
    with pytest.raises(NotFound, match="there are: 1, 2"):
        read(f"{layout.root}:3")


def test_images_without_names_are_told_apart_by_platform_or_not_at_all(layout: Layout) -> None:
    for platform, layer in (("arm64", ONE), ("amd64", TWO)):
        entry = layout.image(layer, enter=False, config={"architecture": platform})
        layout.enter({**entry, "platform": {"os": "linux", "architecture": platform}})
    assert layers(layout.root) == [sha256(TWO)]
    other = Layout(layout.root.parent / "other")
    other.image(ONE)
    other.image(TWO)
    with pytest.raises(Ambiguous, match="nothing tells which"):
        read(other.root)


@pytest.mark.parametrize("depth", [1, 3])
def test_an_index_of_platforms(layout: Layout, depth: int) -> None:
    entries = []
    for architecture, layer in (("arm64", ONE), ("amd64", TWO), ("unknown", ONE)):
        entry = layout.image(layer, enter=False, config={"architecture": architecture})
        system = "unknown" if architecture == "unknown" else "linux"
        entries.append({**entry, "platform": {"os": system, "architecture": architecture}})
    found = layout.document({"schemaVersion": 2, "manifests": entries}, INDEX)
    for _ in range(depth - 1):
        found = layout.document({"schemaVersion": 2, "manifests": [found]}, INDEX)
    layout.enter({**found, "annotations": {"io.containerd.image.name": "host/app:1"}})
    assert layers(f"{layout.root}:1") == [sha256(TWO)]
    assert read(layout.root).names == ("host/app:1",)


def test_an_index_without_this_platform(layout: Layout) -> None:
    entry = layout.image(ONE, enter=False, config={"architecture": "arm64"})
    platform = {"platform": {"os": "linux", "architecture": "arm64", "variant": "v8"}}
    layout.enter(layout.document({"schemaVersion": 2, "manifests": [{**entry, **platform}]}, INDEX))
    with pytest.raises(Unsupported, match="linux/amd64; it has: linux/arm64/v8"):
        read(layout.root)


def test_indexes_without_end_are_refused(layout: Layout) -> None:
    found = layout.image(ONE, enter=False)
    for _ in range(8):
        found = layout.document({"schemaVersion": 2, "manifests": [found]}, INDEX)
    layout.enter(found)
    with pytest.raises(Damaged, match="deep"):
        read(layout.root)


# -- docker save ----------------------------------------------------------------------------------


def test_what_docker_saves(tmp_path: Path) -> None:
    path = docker_archive(tmp_path / "saved.tar", ONE, TWO, ONE, tags=("host/app:1", "app:2"))
    image = read(path)
    assert (image.format, image.names, layers(f"{path}:2")) == (
        "docker-archive",
        ("host/app:1", "app:2"),
        [sha256(ONE), sha256(TWO), sha256(ONE)],
    )
    assert image.layers[0].size == image.layers[2].size == len(ONE)
    with pytest.raises(NotFound, match="app:2, host/app:1"):
        read(f"{path}:3")


def test_the_same_image_in_other_files_has_the_same_id(tmp_path: Path, layout: Layout) -> None:
    layout.image(ONE, TWO, media_type=PLAIN)
    saved = docker_archive(tmp_path / "saved.tar", ONE, TWO)
    assert read(layout.root).ident == read(saved).ident == read(layout.as_tar(tmp_path / "tar")).ident


# -- what is no image, or a wrong one -------------------------------------------------------------


def test_other_files_are_told_from_images(tmp_path: Path, layout: Layout) -> None:
    (tmp_path / "text").write_text("text\n" * 1000)
    (tmp_path / "packed").write_bytes(b"\x1f\x8b" + bytes(600))
    (tmp_path / "rootfs").mkdir()
    (tmp_path / "tar").write_bytes(ONE)
    os.mkfifo(tmp_path / "fifo")
    for name, word in {
        "text": "no tar",
        "packed": "gunzip first",
        "rootfs": "neither an OCI layout",
        "tar": "neither an OCI layout",
        "fifo": "is no file",
    }.items():
        with pytest.raises(ImageError, match=word):
            read(tmp_path / name)
    (layout.root / "oci-layout").write_text('{"imageLayoutVersion":"2.0.0"}')
    with pytest.raises(Unsupported, match=r"2\.0\.0"):
        read(layout.root)


Change = Callable[[Layout], Any]

WRONG: dict[str, tuple[Change, type[ImageError], str]] = {
    "no JSON": (lambda it: it.enter(it.blob(b"{", MANIFEST)), Damaged, "no JSON"),
    "another JSON": (lambda it: it.enter(it.blob(b"[]", MANIFEST)), Damaged, "no JSON object"),
    "deep JSON": (lambda it: it.enter(it.blob(b"[" * 100_000, MANIFEST)), Damaged, "no JSON"),
    "an index that is none": (lambda it: it.enter({"digest": 1}), Damaged, "size"),
    "an old schema": (lambda it: it.image(ONE, schemaVersion=1), Unsupported, "skopeo copy"),
    "something else": (lambda it: it.enter(it.blob(b"x", "application/x")), Unsupported, "application/x"),
    "no media type": (lambda it: it.enter(it.blob(b"x", "")), Unsupported, "no image"),
    "a layer of another kind": (lambda it: it.image(ONE, media_type="text/x"), Unsupported, "text/x"),
    "an encrypted layer": (
        lambda it: it.image(ONE, media_type=f"{PLAIN}+gzip+encrypted"), Unsupported, "encrypted",
    ),
    "an artifact": (
        lambda it: it.image(ONE, config_blob=it.document({}, "application/vnd.oci.empty.v1+json")),
        Unsupported,
        "no container image",
    ),
    "an empty config": (
        lambda it: it.image(ONE, config_blob=it.document({}, CONFIG_TYPE)), Unsupported, "unknown platform",
    ),
    "another platform": (
        lambda it: it.image(ONE, config={"architecture": "arm64"}), Unsupported, "linux/arm64",
    ),
    "too few layers": (lambda it: it.image(ONE, layers=[]), Damaged, "0 layers"),
    "no list of layers": (lambda it: it.image(ONE, layers={}), Damaged, "no array"),
    "a digest that is a path": (
        lambda it: it.image(ONE, layers=[{"mediaType": PLAIN, "digest": "sha256:../../x", "size": 1}]),
        Damaged,
        "for a digest",
    ),
    "a size below nothing": (
        lambda it: it.image(ONE, layers=[{"mediaType": PLAIN, "digest": sha256(ONE), "size": -1}]),
        Damaged,
        "for a size",
    ),
    "a size that is true": (
        lambda it: it.image(ONE, layers=[{"mediaType": PLAIN, "digest": sha256(ONE), "size": True}]),
        Damaged,
        "for a size",
    ),
    "a large document": (
        lambda it: it.enter({"mediaType": MANIFEST, "digest": sha256(b""), "size": 1 << 40}),
        TooLarge,
        "bytes",
    ),
    "env of numbers": (lambda it: it.image(ONE, config={"config": {"Env": [1]}}), Damaged, "Env"),
    "env with zeros": (lambda it: it.image(ONE, config={"config": {"Env": ["A=\0"]}}), Damaged, "Env"),
    "broken text": (lambda it: it.image(ONE, config={"config": {"User": "\ud800"}}), Damaged, "valid"),
    "labels that are none": (lambda it: it.image(ONE, config={"config": {"Labels": [1]}}), Damaged, "no"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_wrong_images_are_told_apart(layout: Layout, what: str) -> None:
    change, kind, word = WRONG[what]
    change(layout)
    with pytest.raises(kind, match=word) as caught:
        read(layout.root)
    assert "\n" not in str(caught.value)


def test_digests_and_sizes_of_documents_are_checked(layout: Layout) -> None:
    entry = layout.image(ONE)
    path = layout.path(entry["digest"])
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"schemaVersion": 2', b'"schemaVersion": 3'))
    with pytest.raises(Damaged, match="not what its digest"):
        read(layout.root)
    path.write_bytes(whole + b" ")
    with pytest.raises(Damaged, match="announced"):
        read(layout.root)
    path.unlink()
    with pytest.raises(NotFound, match="incomplete"):
        read(layout.root)


@pytest.mark.parametrize(
    "write, kind, word",
    [
        (lambda path: docker_archive(path, ONE, name=f"{'0' * 64}.json"), Damaged, "name"),
        (lambda path: docker_archive(path, ONE, layers=[]), Damaged, "0 layers"),
        (lambda path: docker_archive(path, ONE, layers=["../../etc/passwd"]), NotFound, "etc/passwd"),
        (lambda path: path.write_bytes(tar(file("manifest.json", "[]"))), NotFound, "no image"),
        (lambda path: path.write_bytes(tar(file("manifest.json", '[{"Config":1}]'))), Damaged, "docker save"),
        (lambda path: path.write_bytes(tar(file("a"), file("a"))), Damaged, "twice"),
        (lambda path: path.write_bytes(ONE[:700]), Damaged, "cut off"),
        (lambda path: path.write_bytes(tar(symlink("manifest.json", "."))), Unsupported, "neither"),
        (lambda path: path.write_bytes(tar(symlink("manifest.json", "/etc/passwd"))), Unsupported, "neither"),
        (lambda path: path.write_bytes(tar(directory("manifest.json"))), Unsupported, "neither"),
    ],
)  # fmt: skip
def test_wrong_archives(
    tmp_path: Path, write: Callable[[Path], Any], kind: type[ImageError], word: str
) -> None:
    write(tmp_path / "tar")
    with pytest.raises(kind, match=word):
        read(tmp_path / "tar")


def test_a_document_that_is_reached_through_a_symlink_is_not_read(layout: Layout) -> None:
    layout.image(ONE)
    (layout.root / "index.json").rename(layout.root.parent / "index.json")
    (layout.root / "index.json").symlink_to("../index.json")
    with pytest.raises(Unsupported, match=r"index\.json"):
        read(layout.root)


# -- what a config makes of a container -----------------------------------------------------------


CONFIG = Config("amd64", "linux", (), entrypoint=("/init", "-x"), command=("serve", "now"))


@pytest.mark.parametrize(
    "entrypoint, args, expected",
    [
        (None, [], ["/init", "-x", "serve", "now"]),
        (None, ["sh"], ["/init", "-x", "sh"]),
        ("/bin/sh", [], ["/bin/sh"]),
        ("/bin/sh", ["-c", "id"], ["/bin/sh", "-c", "id"]),
        ("", [], []),
        ("", ["sh"], ["sh"]),
    ],
)
def test_entrypoint_and_cmd_as_docker_has_them(
    entrypoint: str | None, args: list[str], expected: list[str]
) -> None:
    assert settings.command(CONFIG, args, entrypoint) == expected


def test_settings_of_an_image(layout: Layout) -> None:
    told: dict[str, Any] = {
        "User": "app:www",
        "Env": ["PATH=/app", "A=b=c", "EMPTY=", "none", "=x"],
        "Entrypoint": None,
        "Cmd": ["serve"],
        "WorkingDir": "srv/data",
        "Volumes": {"/data": {}, "relative": {}, "/a/../..": {}},
        "Labels": {"k": "v"},
        "StopSignal": "SIGQUIT",
        "ExposedPorts": {"80/tcp": {}},
        "Healthcheck": {"Test": ["x"]},
    }
    layout.image(ONE, config={"config": told})
    made = settings.of(read(layout.root).config, [])
    assert made.args == ("serve",)
    assert made.env == ("PATH=/app", "A=b=c", "EMPTY=")
    assert (made.workdir, made.user, made.labels) == ("/srv/data", "app:www", {"k": "v"})
    assert "relative" not in made.volumes
    [volume, *_] = settings.volume_mounts(["/data", "/taken"], ["/taken"])
    assert (volume["destination"], "tmpcopyup" in volume["options"]) == ("/data", True)


def test_an_image_that_says_nothing_is_one(layout: Layout) -> None:
    layout.image(config={"config": None, "rootfs": {"type": "layers", "diff_ids": None}})
    made = settings.of(read(layout.root).config, [])
    assert made == settings.Settings(args=(), workdir="/")


def test_labels_beyond_what_a_container_can_have_are_left_out() -> None:
    large = Config("amd64", "linux", (), labels={"k": "v" * (1 << 20)})
    assert settings.of(large, []).labels == {}
