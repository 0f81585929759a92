"""What is fuzzed: bytes in, and the promise that nothing is raised but what the contract names."""

from __future__ import annotations

import traceback
from collections.abc import Hashable
from pathlib import Path
from typing import Protocol

ROOT = Path(__file__).resolve().parents[2]


class Broken(AssertionError):
    """An invariant did not hold."""


class Target(Protocol):
    """``coverage``: whether the code under test is in this process, so that atheris can see its branches."""

    name: str
    coverage: bool

    def open(self, directory: Path) -> None:
        """Makes ready; ``directory`` is empty, and the only place that may be written to."""

    def seeds(self) -> list[bytes]:
        """Inputs to begin with."""

    def execute(self, data: bytes) -> Hashable:
        """One input. What it returns tells outcomes apart; whatever it raises is a finding."""

    def close(self) -> None:
        """Ends, and raises for what was only to be seen at the end."""


def where(error: BaseException) -> str:
    """What makes two findings the same: the kind, and the last place of ours that it passed."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename.startswith(str(ROOT)) and "/tests/fuzz/engine" not in frame.filename
    ]
    place = f"{Path(frames[-1].filename).relative_to(ROOT)}:{frames[-1].lineno}" if frames else "?"
    said = str(error).partition("\n")[0][:80] if isinstance(error, Broken) else ""
    return f"{type(error).__name__} {place} {said}".strip()
