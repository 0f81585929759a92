"""The soak for a moment: its load, its looking and its verdict, as ``make soak`` has them for an hour."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.cases.agents import REPO
from tests.soak.__main__ import differences
from tests.soak.load import MIX


@pytest.mark.timeout(300)
def test_nothing_is_left_or_grown_in_a_moment(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "tests.soak", "--minutes", "0.05", "--out", str(tmp_path)],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    document = json.loads((tmp_path / "soak.json").read_text())
    assert document["wrong"] == []
    assert document["kills"] > 0
    assert document["rounds"].keys() == {work.__name__ for work in MIX}
    assert document["before"]["agent_fds"] == document["after"]["agent_fds"] > 0
    ElementTree.fromstring((tmp_path / "soak.svg").read_text())


def test_what_is_not_as_it_was_is_named_but_for_memory() -> None:
    before = {"agent_fds": 19, "agent_kib": 20_000, "zombies": 0}
    assert differences(before, {"agent_fds": 19, "agent_kib": 21_000, "zombies": 0}) == []
    assert differences(before, {"agent_fds": 20, "agent_kib": 20_000, "zombies": 1}) == [
        "agent_fds: 20, before 19",
        "zombies: 1, before 0",
    ]
