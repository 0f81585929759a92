"""The recorded tour and README's are one: each line that was recorded still stands there, in that order."""

from __future__ import annotations

import pytest

from tests import tour
from tests.cases.agents import REPO

RECORDED = (REPO / "tests" / "tour.txt").read_text()
README = tour.commands((REPO / "README.md").read_text())


def test_what_was_recorded_is_what_readme_says() -> None:
    remaining = iter(README)
    missing = [
        line
        for line in RECORDED.splitlines()
        if line.startswith("$ ") and line.removeprefix("$ ") not in remaining
    ]
    assert missing == [], "README's tour has changed: `make tour` records it anew"


def test_it_went_well() -> None:
    """A line that fails ends the recording; these are what a person would look for."""
    for words in ("\n137\n", "+PONG", "the host says hello", "uid=33(www-data)", "Linux x86_64"):
        assert words in RECORDED
    assert "Traceback" not in RECORDED
    assert "\x1b" not in RECORDED


@pytest.mark.parametrize("words", tour.LEFT_OUT)
def test_what_is_left_out_is_there_to_be_left_out(words: str) -> None:
    assert sum(words in line for line in README) == 1


def test_lines_are_run_as_they_stand_unless_somebody_must_type_or_stop_them() -> None:
    assert tour.as_run("gcsctl ps  # all") == "gcsctl ps  # all"
    assert tour.as_run("gcsctl exec -it web -- sh").startswith("python3 -m tests.tour --type ")
    assert tour.as_run("gcsctl logs -f web").startswith("timeout --preserve-status -s INT 5 bash -c")
