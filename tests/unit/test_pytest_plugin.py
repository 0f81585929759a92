"""The pytest plugin where no VM can be booted: it says what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
ASKING = "def test_asks(gcs_container):\n    raise AssertionError('there is no VM')\n"


def run_pytest(directory: Path, *options: str) -> str:
    """What a user's pytest says; it fails."""
    (directory / "pytest.ini").write_text("[pytest]\n")
    (directory / "test_asks.py").write_text(ASKING)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "gcsagent.host.pytest_plugin", *options],
        cwd=directory,
        env={**os.environ, "PYTEST_ADDOPTS": "", "PYTHONPATH": str(REPO), "GCS_QEMU": "/nowhere"},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "options, said",
    [
        ((), "give --gcs-rootfs=PATH or set gcs_rootfs in the ini file"),
        (("--gcs-rootfs", "/", "--gcs-memory", "much"), "gcs_memory and gcs_cpus are whole numbers"),
        (("--gcs-rootfs", "/", "--gcs-net", "wifi"), "network 'wifi' must be one of none, user"),
        (("--gcs-rootfs", "/"), "GCS_QEMU=/nowhere is not an executable file"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, options: tuple[str, ...], said: str) -> None:
    output = run_pytest(tmp_path, *options)
    assert said in output
    assert "there is no VM" not in output
