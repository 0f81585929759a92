"""How `make test` runs its halves: all lines, one count, and no success that is none."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import side_by_side

GOOD = "def test_good():\n    pass\n"
BAD = "def test_bad():\n    assert 1 == 2\n"


def halves(directory: Path, **tests: str) -> dict[str, tuple[str, ...]]:
    made: dict[str, tuple[str, ...]] = {}
    for name, text in tests.items():
        path = directory / f"test_{name}.py"
        path.write_text(text)
        made[name] = (str(path),)
    return made


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    line = capsys.readouterr().out.splitlines()[-1]
    return re.sub(r" in \d:\d\d:\d\d$", "", line)


def test_both_are_shown_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert side_by_side.run(halves(tmp_path, one=GOOD * 2, two=GOOD)) == 0
    *shown, last = capsys.readouterr().out.splitlines()
    assert {line.split(" | ")[0] for line in shown} == {"one ", "two "}
    assert [line for line in shown if line.startswith("two  | 1 passed in ")]
    assert last.startswith("2 passed, 0 did not, of 1 (one) + 1 (two) tests in 0:00:")


@pytest.mark.parametrize(
    "other,told",
    [
        (BAD, "1 passed, 1 did not, of 1 (one) + 1 (two) tests"),
        ("", "1 passed, 0 did not, of 1 (one) + 0 (two) tests"),
        ("import nothing_of_that_name\n", "1 passed, 1 did not, of 1 (one) + 1 (two) tests"),
        ("import os\nos._exit(0)\n", "1 passed, 0 did not, of 1 (one) + 0 (two) tests"),
    ],
    ids=["fails", "has-no-tests", "cannot-be-read", "ends-in-the-middle"],
)
def test_a_half_that_is_not_well_fails_the_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], other: str, told: str
) -> None:
    assert side_by_side.run(halves(tmp_path, one=GOOD, two=other)) == 1
    assert last_line(capsys) == told


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_ends_both(tmp_path: Path, signum: signal.Signals) -> None:
    ready = tmp_path / "ready"
    os.mkfifo(ready)
    slow = f"import time\ndef test_slow():\n    open({str(ready)!r}, 'w').close()\n    time.sleep(1000)\n"
    code = f"from tests import side_by_side as s; s.HALVES = {halves(tmp_path, one=slow, two=slow)}; s.main()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        for _ in range(2):
            ready.read_bytes()
        process.send_signal(signum)
        out, _ = process.communicate(timeout=60)
    assert out.count("| no tests ran in ") == 2
