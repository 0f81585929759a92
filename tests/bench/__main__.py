"""Takes the figures: ``python -m tests.bench --tier host``. Exit status 1 when one could not be taken."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import shlex
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from tests.bench import crowds, execs, host, lifecycle, machine, pings, plot, report, streams, vm, vmfigures
from tests.bench.figures import FIGURES, Figure, Measured

World = Callable[[Path], contextlib.AbstractAsyncContextManager[Any]]
GROUPS = (execs, lifecycle, streams, pings, crowds, vmfigures)
WORLDS: dict[str, World] = {"host": host.world, "vm": vm.world}
FIGURE_SECONDS = 240.0
"""After that a figure is given up, and the next one has its turn."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--tier", choices=list(WORLDS), help="one tier only")
    parser.add_argument("--only", action="append", metavar="NAME", help="this figure only; again for others")
    parser.add_argument("--samples", type=int, metavar="N", help="pairs per figure instead of its own number")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write bench.json, bench.md and bench.svg there"
    )
    parser.add_argument("--list", action="store_true", help="names what there is, and ends")
    options = parser.parse_args()
    names = options.only or [figure.name for figure in FIGURES]
    if unknown := set(names) - {figure.name for figure in FIGURES}:
        parser.error(f"no figure {', '.join(sorted(unknown))}; --list names them")
    wanted = [f for f in in_order() if f.name in names and options.tier in (None, f.tier)]
    if options.list:
        for figure in wanted:
            print(f"{figure.name:18} {figure.tier:5} {figure.what}")
        return 0
    document = asyncio.run(take(wanted, options.samples))
    print("\n" + report.table(document), flush=True)
    if options.out is not None:
        write(document, options.out)
    return 1 if any(found["error"] for found in document["figures"]) else 0


def in_order() -> list[Figure]:
    """As the groups are named, whoever imported whom first."""
    modules = [group.__name__ for group in GROUPS]
    return sorted(FIGURES, key=lambda figure: modules.index(figure.measure.__module__))


def write(document: report.Document, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "bench.json").write_text(json.dumps(document, indent=1) + "\n")
    (directory / "bench.md").write_text(report.table(document))
    (directory / "bench.svg").write_text(plot.svg(document))


async def take(wanted: list[Figure], samples: int | None) -> report.Document:
    document: report.Document = {
        "date": time.strftime("%Y-%m-%d"),
        "command": shlex.join(["python", "-m", "tests.bench", *sys.argv[1:]]),
        "machine": machine.facts(),
        "figures": [],
    }
    for tier in dict.fromkeys(figure.tier for figure in wanted):
        document["figures"] += await _tier(tier, [f for f in wanted if f.tier == tier], samples)
    return document


async def _tier(tier: str, wanted: list[Figure], samples: int | None) -> list[report.Document]:
    """A world that does not come up fails its figures; one that does not go down in order, none."""
    found: list[report.Document] = []
    try:
        async with _world(tier) as world:
            for figure in wanted:
                found.append(await _one(figure, world, samples or figure.samples))
                print(report.line(found[-1]), flush=True)
    except Exception as error:
        print(f"{tier}: {error!r}", file=sys.stderr)
        found += [report.entry(figure, 0.0, None, _reason(error)) for figure in wanted[len(found) :]]
        if found and not any(each["error"] for each in found):
            found[-1]["error"] = f"after the last figure: {_reason(error)}"
    return found


@contextlib.asynccontextmanager
async def _world(tier: str) -> AsyncIterator[Any]:
    before, tempfile.tempdir = tempfile.tempdir, memory_file_system()
    try:
        with tempfile.TemporaryDirectory(prefix="gcs-bench-") as directory:
            async with WORLDS[tier](Path(directory)) as world:
                yield world
    finally:
        tempfile.tempdir = before


def memory_file_system() -> str | None:
    """For all that is written: where a guest has its state, and where no disk wobbles."""
    tmpfs = {line.split()[1] for line in Path("/proc/mounts").read_text().splitlines() if " tmpfs " in line}
    return next((path for path in ("/run", "/dev/shm", "/tmp") if path in tmpfs), None)


async def _one(figure: Figure, world: Any, samples: int) -> report.Document:
    began = time.monotonic()
    measured: Measured | None = None
    error = ""
    try:
        async with asyncio.timeout(FIGURE_SECONDS):
            measured = await figure.measure(world, samples)
    except Exception as failure:
        error = _reason(failure)
    return report.entry(figure, time.monotonic() - began, measured, error)


def _reason(error: BaseException) -> str:
    if isinstance(error, BaseExceptionGroup):
        return _reason(error.exceptions[0])
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


if __name__ == "__main__":
    sys.exit(main())
