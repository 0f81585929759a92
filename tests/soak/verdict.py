"""What may differ at the end of a soak, and what not."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

Sample = dict[str, Any]

LONGEST_WINDOW, SHORTEST_WINDOW = 300.0, 60.0

DRIFT_KIB = {"supervisor_kib": 512, "agent_kib": 2048}
"""What the median of a window may be above that of an earlier one, everything that is bounded having been
full in both: it is the load's own noise."""

GROWTH_KIB = {"supervisor_kib": 4096, "agent_kib": 12288}
"""What memory may be above the beginning, at rest: the rings of events and of the log fill up to their bounds
(1.5 MiB, which nobody has touched at first), and allocators keep what the load's busiest moment has taken."""


def differences(before: Sample, after: Sample) -> list[str]:
    """Of everything but memory: it must be what it was."""
    return [
        f"{name}: {after.get(name)}, before {value}"
        for name, value in before.items()
        if not name.endswith("_kib") and after.get(name) != value
    ]


def memory(
    samples: Sequence[Sample], kills: Sequence[float], before: Sample, after: Sample
) -> tuple[list[str], list[str]]:
    """What was compared, in words, and what of it is too much.

    A leak goes on as long as the load does, a ring or a cache stops at its bound. So two windows under load
    are compared, both behind the last kill, since an agent's life begins small, and the first one not
    before that life has met everything; a soak too short for two of them shows only what it ends with.
    """
    compared = []
    wrong = [
        f"{name}: {after[name]} at rest, before {before[name]}"
        for name, most in GROWTH_KIB.items()
        if after[name] > before[name] + most
    ]
    begin, end = (max(kills, default=0.0), max((each["at"] for each in samples), default=0.0))
    window = min(LONGEST_WINDOW, (end - begin) / 4)
    if window < SHORTEST_WINDOW:
        return [f"too short to compare memory under load: {end - begin:.0f} s behind the last kill"], wrong
    for name, most in DRIFT_KIB.items():
        early = _median(name, samples, begin + window, begin + 2 * window)
        late = _median(name, samples, end - window, end)
        compared.append(
            f"{name}, median of {window:.0f} s under load: {late:.0f} at the end,"
            f" {early:.0f} from {begin + window:.0f} s on"
        )
        if late > early + most:
            wrong.append(f"{compared[-1]}: it goes on growing")
    return compared, wrong


def _median(name: str, samples: Sequence[Sample], begin: float, end: float) -> float:
    return statistics.median(float(each[name]) for each in samples if begin <= each["at"] <= end)
