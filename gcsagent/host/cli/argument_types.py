"""What argparse's ``type=`` takes here: from an argument's text to its value, or ArgumentTypeError.

``typed`` and ``checked`` make such a type: of a function that raises ValueError, and of one of protocol's
checks, which answer with the problem or None.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeVar

from protocol import checks

T = TypeVar("T")


def typed(read: Callable[[str], T]) -> Callable[[str], T]:
    """``read`` raises ValueError for what it cannot read."""

    def convert(text: str) -> T:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None

    return convert


def checked(check: Callable[[str], str | None]) -> Callable[[str], str]:
    """The text itself, where ``check`` has no problem with it."""

    def convert(text: str) -> str:
        problem = check(text)
        if problem is not None:
            raise argparse.ArgumentTypeError(f"{text!r} {problem}")
        return text

    return convert


def between(low: float, high: float, unit: str) -> Callable[[str], float]:
    """A number of ``unit``, which may have a fraction."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{unit} from {low:g} to {high:g}, not {text!r}")
        return value

    return convert


def whole(low: int, high: int) -> Callable[[str], int]:
    """A whole number in decimal digits; ``high`` has 9 of them at most."""

    def convert(text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) <= 9 and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"{text!r}: give a number from {low} to {high}")
        return int(text)

    return convert


interval = between(0.001, 3600, "seconds")
patience = between(0, 600, "seconds")
"""What may be waited for, or for nothing at all."""


def count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 12):
        raise argparse.ArgumentTypeError(f"{text!r}: give a number")
    return int(text)


def identifier(text: str) -> str:
    problem = checks.identifier(text)
    if problem is not None:
        raise argparse.ArgumentTypeError(f"an id {problem}")
    return text


def add_id(parser: argparse.ArgumentParser) -> None:
    """The container that a command is about."""
    parser.add_argument("id", type=identifier, metavar="ID")


def add_ids(parser: argparse.ArgumentParser) -> None:
    """The containers that a command is about, one or more."""
    parser.add_argument("ids", nargs="+", type=identifier, metavar="ID")


def signal(text: str) -> int | str:
    """A number, or a name in capitals."""
    value: int | str = int(text) if text.isascii() and text.isdigit() else text.upper()
    problem = checks.signal(value)
    if problem is not None:
        raise argparse.ArgumentTypeError(f"{text!r} {problem}")
    return value


def absolute_path(text: str) -> str:
    problem = checks.absolute_path(text)
    if problem is not None:
        raise argparse.ArgumentTypeError(problem)
    return text


def argument(text: str) -> str:
    """One of the command's own, which the agent takes as UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("arguments must be valid UTF-8") from None
    return text


# -- for readers that raise ValueError ------------------------------------------------------------


def require(problem: str | None) -> None:
    """Raises ValueError for a check's problem."""
    if problem is not None:
        raise ValueError(problem)


def cpus(text: str) -> float:
    value = float(text)
    require(checks.cpus(value))
    return value
