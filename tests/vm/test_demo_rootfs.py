"""The root file system that demo and tests run containers from."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
# fs/erofs/erofs_fs.h: little-endian, at byte 1024.
EROFS_MAGIC = (0xE0F5E1E2).to_bytes(4, "little")

# The first test may have to build it.
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def made() -> Path:
    done = subprocess.run(
        [REPO / "scripts/make-demo-rootfs.sh"], stdout=subprocess.PIPE, text=True, timeout=600, check=True
    )
    return Path(done.stdout.strip())


@pytest.mark.parametrize(
    "command, shown",
    [
        (["python3", "-c", "import sqlite3, ssl, json; print(6 * 7)"], "42\n"),
        (["sqlite3", ":memory:", "select 6 * 7"], "42\n"),
        (["sh", "-c", "printf abc | sha256sum | cut -c1-8"], "ba7816bf\n"),
        (["bash", "-c", "type -t ps stty dd head sleep cat"], "file\n" * 6),
        (["id", "-u"], "0\n"),
    ],
)
def test_programs_run(made: Path, command: list[str], shown: str) -> None:
    done = subprocess.run(
        ["chroot", made / "rootfs", *command],
        env={"PATH": "/usr/sbin:/usr/bin", "LC_ALL": "C.UTF-8"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, shown, "")


def test_nothing_of_this_host_is_in_it(made: Path) -> None:
    etc = made / "rootfs/etc"
    assert (etc / "hostname").read_text() == "demo\n"
    assert (etc / "resolv.conf").read_text() == ""
    assert list((etc / "apt/sources.list.d").iterdir()) == []


def test_block_device_image_is_erofs_of_modest_size(made: Path) -> None:
    image = made / "rootfs.erofs"
    with image.open("rb") as stream:
        stream.seek(1024)
        assert stream.read(4) == EROFS_MAGIC
    assert image.stat().st_size < 70_000_000


def test_second_call_makes_nothing(made: Path) -> None:
    done = subprocess.run(
        [REPO / "scripts/make-demo-rootfs.sh"], capture_output=True, text=True, timeout=120, check=True
    )
    assert Path(done.stdout.strip()) == made
    assert "installing" not in done.stderr
