"""The pytest plugin as its users have it: README's example, in a pytest and a VM of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
SECONDS = 240.0

FAILING = """
import pytest
from gcsagent.host.testing import CommandFailed

def test_shows_the_console(gcs_vm):
    gcs_vm.run("sh", "-c", "echo none such >&2; exit 3", check=True)

def test_what_a_container_offers(gcs_vm, gcs_container, tmp_path):
    (tmp_path / "in").write_text("moved")
    gcs_container.put(tmp_path / "in", "/tmp/there")
    assert gcs_container.run("cat", input="typed").stdout == "typed"
    gcs_container.get("/tmp/there", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "moved"
    assert gcs_container.run("sh", "-c", "kill -KILL $$").exit_code == 137
    with pytest.raises(CommandFailed, match="exited 1"):
        gcs_container.run("false", check=True)
    with pytest.raises(TimeoutError):
        gcs_container.run("sleep", "1000", timeout=0.5)
    with gcs_vm.container("sh", "-c", "echo out; echo err >&2; exit 4") as other:
        assert other.wait().exit_code == 4
        assert other.logs() == ("out\\n", "err\\n")
    left = gcs_vm.call(lambda client: client.list_containers())
    assert [each.container for each in left] == [gcs_container.id]
"""


def test_readmes_example_runs_and_a_failure_shows_the_console(
    built_image: Path, rootfs_image: Path, tmp_path: Path
) -> None:
    found = re.search(
        r"```python\n# (test_example\.py)\n(.*?)```", (REPO / "README.md").read_text(), re.DOTALL
    )
    assert found is not None, "README has no pytest example"
    (tmp_path / found[1]).write_text(found[2])
    (tmp_path / "test_failing.py").write_text(FAILING)
    (tmp_path / "pytest.ini").write_text(f"[pytest]\ngcs_rootfs = {rootfs_image}\ngcs_memory = 512\n")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "gcsagent.host.pytest_plugin",
            f"--gcs-image={built_image}",
            "-v",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTEST_ADDOPTS": "", "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    verdicts = dict(re.findall(r"::(\w+) (PASSED|FAILED|ERROR)", done.stdout))
    assert verdicts == {
        "test_a_kernel_of_its_own": "PASSED",
        "test_a_server_answers": "PASSED",
        "test_shows_the_console": "FAILED",
        "test_what_a_container_offers": "PASSED",
    }, done.stdout
    assert "exited 3: none such" in done.stdout
    assert "the VM's console, its end" in done.stdout
    assert "gcs-boot: " in done.stdout
