"""The soak for a moment: its load, its looking and its verdict, as ``make soak`` has them for an hour."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.cases.agents import REPO
from tests.soak.load import MIX
from tests.soak.verdict import differences, memory


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
    assert len(document["kills"]) > 0
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


MIB = 1024
FLAT = {"supervisor_kib": 9 * MIB, "agent_kib": 21 * MIB}


def _hour(agent_kib: Callable[[float], float]) -> list[dict[str, float]]:
    return [{**FLAT, "at": at, "agent_kib": agent_kib(at)} for at in range(0, 3600, 10)]


def test_a_ring_that_fills_up_is_no_leak_and_what_never_stops_is_one() -> None:
    kills = [10.0, 1800.0]
    filling = _hour(lambda at: 21 * MIB + min(at, 2000) * 4)  # 8 MiB, full a little after the last kill
    compared, wrong = memory(filling, kills, FLAT, FLAT | {"agent_kib": 29 * MIB})
    assert wrong == []
    assert "29504 at the end" in compared[1]
    leaking = _hour(lambda at: 21 * MIB + at * 2.5)
    _, wrong = memory(leaking, kills, FLAT, FLAT | {"agent_kib": 30 * MIB})
    assert len(wrong) == 1
    assert "agent_kib" in wrong[0]
    assert "goes on growing" in wrong[0]


def test_at_rest_it_is_bounded_however_short_the_soak() -> None:
    after = FLAT | {"supervisor_kib": 14 * MIB}
    compared, wrong = memory(_hour(lambda _: 21 * MIB)[:20], [100.0], FLAT, after)
    assert wrong == ["supervisor_kib: 14336 at rest, before 9216"]
    assert compared == ["too short to compare memory under load: 90 s behind the last kill"]
