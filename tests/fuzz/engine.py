"""Runs one target for a while: by coverage where atheris can see the code, else by how answers differ."""

from __future__ import annotations

import hashlib
import json
import random
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fuzz.mutate import Mutator
from tests.fuzz.target import Target, where

MAX_INPUT = 1 << 16
SLOW_SECONDS = 20.0
"""One input that takes longer is a finding, whatever comes of it."""


@dataclass(slots=True)
class Report:
    """``known``: findings by what makes them the same, and the file of the first of each."""

    target: str
    seed: int
    directory: Path
    executions: int = 0
    seconds: float = 0.0
    outcomes: int = 0
    guided_by: str = "outcomes"
    known: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    interrupted: bool = False

    def interrupt(self) -> None:
        """The input that is being tried is the last one. No exception, which whatever runs might take."""
        self.interrupted = True

    def note(self, error: BaseException, data: bytes) -> None:
        name = where(error)
        self.counts[name] = self.counts.get(name, 0) + 1
        if name in self.known:
            return
        path = self.directory / f"{self.target}-{hashlib.sha256(name.encode()).hexdigest()[:12]}.json"
        self.known[name] = str(path)
        document = {
            "target": self.target,
            "finding": name,
            "seed": self.seed,
            "execution": self.executions,
            "bytes": data.hex(),
            "traceback": "".join(traceback.format_exception(error))[-8000:],
            "replay": f"python -m tests.fuzz --replay {path}",
        }
        path.write_text(json.dumps(document, indent=1) + "\n")
        print(f"finding: {name}\n  {document['replay']}", flush=True)

    def write(self) -> None:
        document: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("target", "seed", "executions", "outcomes", "guided_by", "known", "counts")
        }
        document["seconds"] = round(self.seconds, 1)
        (self.directory / f"{self.target}.result").write_text(json.dumps(document, indent=1) + "\n")


class Run:
    def __init__(self, target: Target, report: Report) -> None:
        self._target, self._report = target, report
        self._began = time.monotonic()
        self._outcomes: set[object] = set()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def one(self, data: bytes) -> bool:
        """Whether its outcome is a new one."""
        report = self._report
        report.executions += 1
        before, began = len(self._outcomes), time.monotonic()
        try:
            self._outcomes.add(self._target.execute(data))
            if (took := time.monotonic() - began) > SLOW_SECONDS:
                raise TimeoutError(f"one input took {took:.1f} s")
        except Exception as error:
            report.note(error, data)
        report.outcomes, report.seconds = len(self._outcomes), self.seconds
        return len(self._outcomes) > before


def by_outcomes(target: Target, mutate: Mutator, seconds: float, report: Report) -> None:
    """Keeps what had a new outcome, and goes on from that."""
    dice, run = random.Random(report.seed), Run(target, report)
    corpus = target.seeds()
    for data in corpus:
        if run.seconds < seconds and not report.interrupted:
            run.one(data)
    while run.seconds < seconds and not report.interrupted:
        data = mutate(dice.choice(corpus), dice)[:MAX_INPUT]
        if run.one(data):
            corpus.append(data)


def by_coverage(
    atheris: Any, target: Target, mutate: Mutator, seconds: float, report: Report, done: Callable[[], None]
) -> None:
    """Does not return: libFuzzer has the process, and ``done`` is called before its end."""
    run = Run(target, report)
    report.guided_by = "coverage"
    corpus = report.directory / f"{target.name}.corpus"
    corpus.mkdir(exist_ok=True)
    for data in target.seeds():
        (corpus / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)

    def test_one_input(data: bytes) -> None:
        run.one(data)
        if run.seconds >= seconds or report.interrupted:
            done()

    def custom(data: bytes, max_size: int, seed: int) -> bytes:
        dice = random.Random(seed)
        if dice.random() < 0.3:
            return bytes(atheris.Mutate(data, max_size))
        return mutate(data, dice)[:max_size]

    options = [
        f"-seed={report.seed & 0x7FFFFFFF or 1}",
        f"-max_len={MAX_INPUT}",
        "-rss_limit_mb=2048",
        "-verbosity=0",
        "-handle_int=0",
    ]
    atheris.Setup(["fuzz", *options, str(corpus)], test_one_input, custom_mutator=custom)
    atheris.Fuzz()
