"""What is made of this tree to be installed: an sdist, and of that a wheel, in an environment of its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from gcsagent import __version__

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("gcsagent", "protocol", "pyproject.toml", "README.md", "LICENSE")
BUILD = "from setuptools import build_meta; build_meta.build_{0}({1!r})"


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where an environment has its programs, the wheel installed in it, nothing of this tree in sight."""
    place = tmp_path_factory.mktemp("distribution")
    tree = place / "tree"
    tree.mkdir()
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tree / part)
    run(sys.executable, "-c", BUILD.format("sdist", str(place)), cwd=tree)
    (sdist,) = place.glob("*.tar.gz")
    run("tar", "-xf", sdist, cwd=place)
    (unpacked,) = (each for each in place.iterdir() if each.is_dir() and each != tree)
    run(sys.executable, "-c", BUILD.format("wheel", str(place)), cwd=unpacked)
    (wheel,) = place.glob("*.whl")
    venv.create(place / "env", with_pip=False)
    (packages,) = (place / "env/lib").glob("python3*/site-packages")
    # The libraries it depends on are those the tests run with.
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    pip = (sys.executable, "-m", "pip", "--python", place / "env/bin/python", "install", "-q", "--no-index")
    run(*pip, "--no-deps", "--disable-pip-version-check", wheel, cwd=place)
    return place / "env" / "bin"


@pytest.mark.timeout(200)
@pytest.mark.parametrize("program", ["gcsctl", "gcsagent"])
def test_the_programs_run_and_say_their_version(programs: Path, program: str) -> None:
    assert run(programs / program, "--version", cwd=programs) == f"{program} {__version__}\n"


def test_pytest_finds_the_plugin_by_itself(programs: Path, tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_one.py").write_text("def test_one() -> None:\n    pass\n")
    assert "gcs_container" in run(programs / "python", "-m", "pytest", "--fixtures", cwd=tmp_path)


def test_the_contract_is_in_it(programs: Path) -> None:
    (where,) = programs.parent.glob("lib/python3*/site-packages/protocol")
    assert (where / "SPEC.md").is_file()
    assert list((where / "vectors").glob("*.json")) != []
