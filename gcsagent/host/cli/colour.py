"""Colours, on a terminal only: not where NO_COLOR is set (no-color.org) and not on a TERM=dumb."""

from __future__ import annotations

import os
from enum import StrEnum
from typing import TextIO


class Colour(StrEnum):
    """Parameters of SGR, ECMA-48 8.3.117."""

    BOLD = "1"
    RED = "31"
    YELLOW = "33"


def paint(text: str, colour: Colour, stream: TextIO) -> str:
    """``text`` as it is to be written to ``stream``."""
    if not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\x1b[{colour}m{text}\x1b[0m"
