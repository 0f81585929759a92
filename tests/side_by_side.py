"""What `make test` runs: the VM's tests beside all others, as neither keeps two cores busy alone.

Every line is shown with its half's name as it comes; a last one counts both.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import IO

HALVES = {"main": ("tests/unit", "tests/runc"), "vm": ("tests/vm",)}
LAST_LINE_SECONDS = 10.0
BAD = ("failures", "errors", "skipped")


class Half:
    """One pytest of its own, and what it reports."""

    def __init__(self, name: str, paths: Sequence[str], directory: Path) -> None:
        self.name = name
        self._report = directory / f"{name}.xml"
        words = ["-q", "--durations=10", f"--junit-xml={self._report}", *paths]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        assert self.process.stdout is not None
        self._shower = threading.Thread(target=_show, args=(name, self.process.stdout), daemon=True)
        self._shower.start()

    def interrupt(self) -> None:
        """Has it end in order, if it still runs."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)

    def finish(self) -> None:
        """Waits for it, and for its last line, unless something that it has left behind keeps its output."""
        self.process.wait()
        self._shower.join(LAST_LINE_SECONDS)

    def counts(self) -> Counter[str]:
        """Tests in all, and the bad ones of each kind; nothing if it did not come to its end."""
        if not self._report.exists():
            return Counter()
        (suite,) = ElementTree.parse(self._report).getroot().iter("testsuite")
        return Counter({kind: int(suite.get(kind, "0")) for kind in ("tests", *BAD)})


def run(halves: Mapping[str, Sequence[str]]) -> int:
    """Runs them side by side; 0 if each ran something, and all that went well."""
    begun = time.monotonic()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gcs-halves-")))
        running = []
        for name, paths in halves.items():
            half = Half(name, paths, directory)
            running.append(half)
            stack.callback(half.finish)
        # Whoever interrupts this means all.
        for half in running:
            stack.callback(half.interrupt)
        statuses = [half.process.wait() for half in running]
        counts = [half.counts() for half in running]
    total = sum(counts, Counter())
    bad = sum(total[kind] for kind in BAD)
    told = " + ".join(f"{each['tests']} ({half.name})" for half, each in zip(running, counts, strict=True))
    took = timedelta(seconds=round(time.monotonic() - begun))
    print(f"{total['tests'] - bad} passed, {bad} did not, of {told} tests in {took}", flush=True)
    return 0 if not any(statuses) and all(each["tests"] for each in counts) else 1


def _show(name: str, lines: IO[str]) -> None:
    with lines:
        for line in lines:
            sys.stdout.write(f"{name:4} | {line}")
            sys.stdout.flush()


def _interrupted(_signum: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    signal.signal(signal.SIGTERM, _interrupted)
    try:
        return run(HALVES)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
