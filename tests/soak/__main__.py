"""``python -m tests.soak --minutes 60``: a mixed load, the agent killed in its first half; nothing may grow.

Writes soak.json and soak.svg. Exit status 1 when something was wrong with an answer, or is left or grown.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.soak import worlds
from tests.soak.load import Load
from tests.soak.plot import svg
from tests.soak.verdict import differences, memory
from tests.soak.worlds import Sample, World

EVERY_SECONDS = 10.0
SETTLE_SECONDS = 120.0


@dataclass(slots=True)
class Soak:
    world: World
    load: Load
    seed: int
    began: float = field(default_factory=time.monotonic)
    times: list[float] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    kills: list[float] = field(default_factory=list)

    @property
    def now(self) -> float:
        return time.monotonic() - self.began

    async def go(self, seconds: float) -> dict[str, Any]:
        await self.load.once()
        before = await self._settled(None)
        over, self.began = asyncio.Event(), time.monotonic()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._time(seconds, over))
                tasks.create_task(self._watch(over))
                tasks.create_task(self._kill(seconds / 2, over))
                tasks.create_task(self.load.until(over))
            wrong, lasted = [], self.now
        except* Exception as group:
            lasted = self.now
            wrong = [_told(error) for error in _leaves(group)]
            print(*wrong, sep="\n", file=sys.stderr, flush=True)  # should the last look fail, too
        after = await self._settled(before)
        wrong += differences(before, after)
        return {
            "seed": self.seed,
            "seconds": round(lasted, 1),
            "rounds": self.load.counts,
            "kills": [round(at, 1) for at in self.kills],
            "before": before,
            "after": after,
            "wrong": wrong,
            "samples": [
                {"at": round(at, 1), **each} for at, each in zip(self.times, self.samples, strict=True)
            ],
        }

    async def _time(self, seconds: float, over: asyncio.Event) -> None:
        try:
            await asyncio.sleep(seconds)
        finally:
            over.set()

    async def _watch(self, over: asyncio.Event) -> None:
        while not over.is_set():
            with contextlib.suppress(OSError):
                found = await self.world.look()
                self.samples.append(found)
                self.times.append(self.now)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(EVERY_SECONDS):
                    await over.wait()

    async def _kill(self, seconds: float, over: asyncio.Event) -> None:
        dice = random.Random(self.seed)
        while self.now < seconds and not over.is_set():
            await self.world.kill()
            self.kills.append(self.now)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(dice.uniform(1, 20)):
                    await over.wait()

    async def _settled(self, before: Sample | None) -> Sample:
        """As it is when nothing is under way: the same twice, or as it was ``before``."""
        found: Sample = {}
        deadline = time.monotonic() + SETTLE_SECONDS
        while time.monotonic() < deadline:
            last, found = found, await self.world.look()
            if differences(before or last or {"zombies": -1}, found) == []:
                return found
            await asyncio.sleep(0.5)  # the kernel tells nobody of a cgroup or a file that goes
        return found


def _leaves(group: BaseExceptionGroup[Exception]) -> list[Exception]:
    found: list[Exception] = []
    for error in group.exceptions:
        found += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found


def _told(error: Exception) -> str:
    """With where it came from: an hour of load is not soon repeated."""
    return "".join(traceback.format_exception(error, limit=-12, chain=False)).strip()


async def soak(seconds: float, seed: int, in_vm: bool) -> dict[str, Any]:
    world = worlds.vm if in_vm else worlds.host
    with tempfile.TemporaryDirectory(prefix="gcs-soak-") as directory:
        async with world(Path(directory)) as made:
            return {"tier": "vm" if in_vm else "host"} | await Soak(
                made, Load(made.target, seed, made.at_once), seed
            ).go(seconds)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--vm", action="store_true", help="in a VM, over vsock")
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("."))
    parser.add_argument("--again", type=Path, metavar="FILE", help="judge and draw a soak.json anew")
    options = parser.parse_args()
    if options.again:
        document = json.loads(options.again.read_text())
    else:
        document = asyncio.run(soak(options.minutes * 60, options.seed, options.vm))
    options.out.mkdir(parents=True, exist_ok=True)
    return show(document, options.out)


def show(document: dict[str, Any], out: Path) -> int:
    """Judges, draws and says how it was; the exit status."""
    samples, kills = document["samples"], document["kills"]
    title = (
        f"{document['tier']}, {document['seconds'] / 60:.0f} min: {sum(document['rounds'].values())} rounds"
    )
    rows = {name: [each[name] for each in samples] for name in document["before"]}
    (out / "soak.json").write_text(json.dumps(document, indent=1) + "\n")
    (out / "soak.svg").write_text(svg([each["at"] for each in samples], rows, kills, title))
    print(f"{title}, {len(kills)} kills of the agent; {document['rounds']}")
    print(f"before {document['before']}\nafter  {document['after']}")
    compared, grown = memory(samples, kills, document["before"], document["after"])
    print("\n".join(compared))
    wrong = document["wrong"] + grown
    print("\n".join(f"wrong: {each}" for each in wrong) or "nothing is wrong, left or grown")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
