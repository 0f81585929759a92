"""Every fuzz target for a moment, in its jail, as ``make fuzz`` has them for as long as one likes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cases.agents import REPO, eventually
from tests.fuzz.__main__ import INTERRUPTED, NAMES
from tests.fuzz.targets import TARGETS

SECONDS = 1.0


@pytest.mark.timeout(200)
@pytest.mark.parametrize("name", TARGETS)
def test_nothing_is_found_in_a_moment(tmp_path: Path, name: str) -> None:
    options = ["--target", name, "--seconds", str(SECONDS), "--seed", "1", "--out", str(tmp_path)]
    ran = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", *options],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    said = ran.stdout + ran.stderr + (tmp_path / f"{name}.log").read_text()
    assert ran.returncode == 0, said
    assert json.loads((tmp_path / f"{name}.result").read_text())["executions"] > 0


def test_every_target_has_a_name() -> None:
    assert tuple(TARGETS) == NAMES


def test_an_interrupted_run_says_so_in_a_line(tmp_path: Path) -> None:
    """Its worker, which has an agent, comes to its end before it."""
    options = ["--target", "wire", "--seconds", "600", "--seed", "1", "--out", str(tmp_path)]
    ran = subprocess.Popen(
        [sys.executable, "-m", "tests.fuzz", *options],
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with ran:
        assert ran.stdout is not None
        said = [ran.stdout.readline()]
        assert eventually(lambda: list(tmp_path.glob("gcs-test-*/gcs.sock")), 60.0)
        ran.send_signal(signal.SIGINT)
        said += ran.stdout.readlines()
        assert ran.wait(60) == INTERRUPTED
    assert said[1:] == [f"interrupted: what was found until then is in {tmp_path}\n"]
    assert json.loads((tmp_path / "wire.result").read_text())["counts"] == {}
