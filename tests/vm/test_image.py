"""What the built image holds, looked at from outside (no VM). Needs root for the chroot."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
SITE = "usr/lib/python3/dist-packages"
# The target, in bytes: under emulation an image's size is boot time.
LIMIT = 18_000_000

# The first test may have to build the image.
pytestmark = pytest.mark.timeout(600)


@dataclass(frozen=True, slots=True)
class Member:
    name: str
    mode: int
    uid: int
    gid: int
    mtime: int
    data: bytes


def newc(archive: bytes) -> Iterator[Member]:
    """Members of concatenated "newc" archives (Documentation/driver-api/early-userspace/buffer-format)."""
    at = 0
    while True:
        # Archives are padded with zeros after their trailer.
        while archive[at : at + 1] == b"\0":
            at += 1
        if at == len(archive):
            return
        assert archive[at : at + 6] == b"070701", f"no cpio header at {at}"
        fields = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        mode, uid, gid, mtime, size, name_size = (*fields[1:4], *fields[5:7], fields[11])
        start = at + 110
        name = archive[start : start + name_size - 1].decode()
        data = (start + name_size + 3) & ~3
        at = (data + size + 3) & ~3
        if name != "TRAILER!!!":
            yield Member(name, mode, uid, gid, mtime, archive[data : data + size])


@pytest.fixture(scope="module")
def image() -> Path:
    """The image of this tree, built if the cache lacks it."""
    done = subprocess.run(
        [REPO / "scripts/build-rootfs.sh"], stdout=subprocess.PIPE, text=True, timeout=600, check=True
    )
    return Path(done.stdout.strip())


@pytest.fixture(scope="module")
def members(image: Path) -> list[Member]:
    unpacked = subprocess.run(
        ["zstd", "-dc", image / "initramfs"], stdout=subprocess.PIPE, timeout=60, check=True
    )
    return list(newc(unpacked.stdout))


@pytest.fixture(scope="module")
def names(members: list[Member]) -> set[str]:
    return {member.name for member in members}


@pytest.fixture(scope="module")
def root(members: list[Member], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    top = tmp_path_factory.mktemp("root")
    for member in members:
        path = top / member.name
        if stat.S_ISDIR(member.mode):
            path.mkdir(exist_ok=True)
        elif stat.S_ISLNK(member.mode):
            path.symlink_to(member.data.decode())
        else:
            path.write_bytes(member.data)
            path.chmod(stat.S_IMODE(member.mode))
    yield top
    shutil.rmtree(top)


def in_guest(root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["chroot", root, *command],
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_size_is_within_the_target(image: Path) -> None:
    assert (image / "initramfs").stat().st_size <= LIMIT


def test_manifest_accounts_for_every_byte(image: Path) -> None:
    sizes = json.loads((image / "manifest.json").read_text())["sizes"]
    assert sum(part["packed"] for part in sizes["parts"].values()) == sizes["initramfs"]
    assert sizes["initramfs"] == (image / "initramfs").stat().st_size
    assert sizes["vmlinuz"] == (image / "vmlinuz").stat().st_size


def test_guest_side_and_contract_are_in_and_nothing_of_the_host_side(names: set[str]) -> None:
    sources = [
        path.relative_to(REPO)
        for package in ("gcsagent", "protocol")
        for path in (REPO / package).rglob("*.py")
    ]
    wanted = {f"{SITE}/{path}c" for path in sources if path.parts[1] != "host"}
    ours = {name for name in names if name.startswith((f"{SITE}/gcsagent/", f"{SITE}/protocol/"))}
    assert {name for name in ours if name.endswith(".pyc")} == wanted
    assert not [name for name in ours if "/host" in name]
    assert not [name for name in ours if not name.endswith(".pyc") and f"{name}/__init__.pyc" not in ours]


def test_python_is_byte_code_only(names: set[str]) -> None:
    assert not [name for name in names if name.endswith(".py") or "__pycache__" in name]


def test_files_belong_to_root_have_no_set_id_bit_and_no_time(members: list[Member]) -> None:
    assert {(member.uid, member.gid, member.mtime) for member in members} == {(0, 0, 0)}
    assert not [member.name for member in members if member.mode & (stat.S_ISUID | stat.S_ISGID)]
    writable = [m.name for m in members if not stat.S_ISLNK(m.mode) and m.mode & 0o022]
    assert not writable


def test_only_folders_files_and_links(members: list[Member]) -> None:
    kinds = {stat.S_IFMT(member.mode) for member in members}
    assert kinds == {stat.S_IFDIR, stat.S_IFREG, stat.S_IFLNK}


def test_stamp_names_commit_key_and_packages(image: Path, members: list[Member]) -> None:
    (text,) = (member.data for member in members if member.name == "etc/gcsagent/build.json")
    stamp = json.loads(text)
    commit = subprocess.run(
        ["git", "-C", REPO, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=30, check=True
    )
    assert stamp["commit"] == commit.stdout.strip()
    assert stamp["key"] == image.name
    assert stamp["kernel"].endswith("-cloud-amd64")
    assert {"runc", "python3.13", "python3-msgpack", "busybox-static"} <= stamp["packages"].keys()
    manifest = json.loads((image / "manifest.json").read_text())
    assert {key: manifest[key] for key in stamp} == stamp


def test_every_listed_module_is_in_unpacked(names: set[str]) -> None:
    listed = [
        line.split()[0]
        for line in (REPO / "initramfs/modules.list").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    present = {Path(name).name for name in names if "/modules/" in name}
    assert not [name for name in present if name.endswith(".xz")]
    # A module's name and its file's may differ in "-" and "_".
    wanted = {f"{module}.ko".replace("-", "_") for module in listed}
    assert wanted <= {name.replace("-", "_") for name in present}


def test_guest_python_imports_every_module_of_ours(root: Path, names: set[str]) -> None:
    modules = sorted(
        name.removeprefix(f"{SITE}/").removesuffix(".pyc").removesuffix("/__init__").replace("/", ".")
        for name in names
        if name.startswith((f"{SITE}/gcsagent/", f"{SITE}/protocol/"))
        and name.endswith(".pyc")
        and not name.endswith("/__main__.pyc")
    )
    code = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)\nprint('all')"
    done = in_guest(root, "/usr/bin/python3", "-P", "-W", "error", "-c", code, *modules)
    assert (done.returncode, done.stdout, done.stderr) == (0, "all\n", "")


@pytest.mark.parametrize(
    "command, shown",
    [
        ("runc --version", "runc version 1."),
        ("busybox sh -c 'echo shell'", "shell"),
        ("python3 -c 'import msgpack; print(msgpack.Packer.__module__)'", "msgpack._cmsgpack"),
        ("python3 -c 'import hashlib; print(hashlib.sha256(b\"\").hexdigest()[:8])'", "e3b0c442"),
    ],
)
def test_programs_run_with_the_images_own_libraries(root: Path, command: str, shown: str) -> None:
    done = in_guest(root, "/bin/sh", "-c", command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(shown)


def test_same_inputs_same_key_and_no_second_build(image: Path) -> None:
    before = os.stat(image / "initramfs").st_ino
    done = subprocess.run(
        [REPO / "scripts/build-rootfs.sh"], capture_output=True, text=True, timeout=120, check=True
    )
    assert Path(done.stdout.strip()) == image
    assert "packing" not in done.stderr
    assert os.stat(image / "initramfs").st_ino == before


def test_two_builds_give_the_same_bytes() -> None:
    done = subprocess.run(
        [REPO / "scripts/build-rootfs.sh", "--check-reproducible"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "reproducible: " in done.stderr
