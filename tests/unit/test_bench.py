"""The benchmarks' own words: a figure that cannot be taken is told of, and the others go on."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.bench import __main__ as bench
from tests.bench import report
from tests.bench.figures import FIGURES, Figure, Measured, at_least, at_most, in_turn, quartiles

HALF = Measured([1.0, 2.0, 4.0], [2.0, 4.0, 8.0])


async def _half(_world: object, _samples: int) -> Measured:
    return HALF


async def _broken(_world: object, _samples: int) -> Measured:
    raise OSError("no such thing")


def _figure(name: str, measure: object, **more: object) -> Figure:
    given = {"target": at_most(1.0), "baseline": "theirs", **more}
    return Figure(name, "toy", f"what {name} is", unit="ms", scale=1000, samples=3, measure=measure, **given)  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def _toy(_directory: Path) -> AsyncIterator[None]:
    yield


@pytest.fixture
def document(monkeypatch: pytest.MonkeyPatch) -> report.Document:
    monkeypatch.setitem(bench.WORLDS, "toy", _toy)
    wanted = [
        _figure("half", _half),
        _figure("broken", _broken),
        _figure("slow", _half, target=at_least(0.9)),
    ]
    return asyncio.run(bench.take(wanted, None))


def test_one_that_fails_is_told_of_and_the_others_go_on(document: report.Document) -> None:
    assert [found["error"] for found in document["figures"]] == ["", "OSError: no such thing", ""]
    rows = report.table(document).splitlines()
    assert "| what half is | theirs | ≤ 1 | **0.50** | 0.50 to 0.50 | 3 | 2000 / 4000 ms |" in rows
    assert "| what broken is | theirs | ≤ 1 | failed: OSError: no such thing | | | |" in rows
    assert "| what slow is | theirs | ≥ 0.9 | 0.50 (missed) | 0.50 to 0.50 | 3 | 2000 / 4000 ms |" in rows
    assert "Linux" in rows[-1]


def test_what_is_written_is_whole(document: report.Document, tmp_path: Path) -> None:
    bench.write(document, tmp_path / "new")
    assert json.loads((tmp_path / "new" / "bench.json").read_text()) == document
    assert (tmp_path / "new" / "bench.md").read_text() == report.table(document)
    picture = ElementTree.parse(tmp_path / "new" / "bench.svg")
    assert "what" not in "".join(picture.getroot().itertext())
    assert "half (toy)" in list(picture.getroot().itertext())


def test_a_world_that_does_not_come_up_fails_its_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_world(_directory: Path) -> contextlib.AbstractAsyncContextManager[None]:
        raise FileNotFoundError("no root file system")

    monkeypatch.setitem(bench.WORLDS, "toy", no_world)
    found = asyncio.run(bench.take([_figure("half", _half)], 1))["figures"]
    assert [each["error"] for each in found] == ["FileNotFoundError: no root file system"]


def test_samples_are_taken_in_turn_and_the_first_of_each_does_not_count() -> None:
    order: list[str] = []

    async def sample(name: str) -> float:
        order.append(name)
        return float(len(order))

    measured = asyncio.run(in_turn(2, lambda: sample("ours"), lambda: sample("theirs")))
    assert order == ["ours", "theirs", "ours", "theirs", "theirs", "ours"]
    assert (measured.ours, measured.baseline) == ([3.0, 6.0], [4.0, 5.0])


def test_quartiles_of_few_and_many() -> None:
    assert quartiles([3.0]) == (3.0, 3.0, 3.0)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)


def test_names_are_each_figures_own() -> None:
    names = [(figure.tier, figure.name) for figure in FIGURES]
    assert len(set(names)) == len(names)
