"""What is measured: a figure is a ratio to a baseline, both taken in turn in the same run.

Whatever else the machine does meanwhile falls on both, and the ratio is of each pair. Figures are printed
and kept, never asserted in a test: a slow machine is no fault in a program.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

LEAST = 3
"""Samples taken even when a figure's time is up."""


@dataclass(frozen=True, slots=True)
class Target:
    """What is promised: a ratio, or an amount, at the most or at the least."""

    bound: float
    most: bool = True

    def met(self, value: float) -> bool:
        return value <= self.bound if self.most else value >= self.bound

    def __str__(self) -> str:
        return f"{'≤' if self.most else '≥'} {self.bound:g}"


def at_most(bound: float) -> Target:
    return Target(bound)


def at_least(bound: float) -> Target:
    return Target(bound, most=False)


@dataclass(slots=True)
class Measured:
    """Samples of ours and, as many, of the baseline; without a baseline the amount itself is the figure."""

    ours: list[float] = field(default_factory=list)
    baseline: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def values(self) -> list[float]:
        """What is compared with the target: the ratio of each pair, or ours alone."""
        if not self.baseline:
            return self.ours
        return [ours / theirs for ours, theirs in zip(self.ours, self.baseline, strict=True)]


Measure = Callable[[Any, int], Awaitable[Measured]]


@dataclass(frozen=True, slots=True)
class Figure:
    """``unit`` is that of the amounts, ``scale`` what a sample is multiplied by to be shown in it."""

    name: str
    tier: str
    what: str
    baseline: str
    target: Target
    unit: str
    scale: float
    samples: int
    measure: Measure


FIGURES: list[Figure] = []


def figure(
    name: str,
    *,
    tier: str,
    what: str,
    target: Target,
    samples: int,
    baseline: str = "",
    unit: str = "ms",
    scale: float = 1.0,
) -> Callable[[Measure], Measure]:
    """Puts a function on the list; it gets its tier's world and how many samples are wanted."""

    def add(measure: Measure) -> Measure:
        FIGURES.append(Figure(name, tier, what, baseline, target, unit, scale, samples, measure))
        return measure

    return add


Sample = Callable[[], Awaitable[float]]


async def in_turn(samples: int, ours: Sample, theirs: Sample, seconds: float = 45.0) -> Measured:
    """One of each to warm up, then pairs, the order changing from pair to pair, until time is up."""
    await ours()
    await theirs()
    measured, end = Measured(), time.monotonic() + seconds
    for number in range(samples):
        if time.monotonic() > end and number >= LEAST:
            break
        if number % 2:
            measured.baseline.append(await theirs())
            measured.ours.append(await ours())
        else:
            measured.ours.append(await ours())
            measured.baseline.append(await theirs())
    return measured


def quartiles(values: Iterable[float]) -> tuple[float, float, float]:
    """First quartile, median, third."""
    ordered = sorted(values)
    if len(ordered) < 2:
        return ordered[0], ordered[0], ordered[0]
    first, median, third = statistics.quantiles(ordered, n=4, method="inclusive")
    return first, median, third
