"""Runs a coroutine and fails if anything kept its event loop from going round."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

LONGEST = 5.0
"""Seconds one callback may take: above what work takes on a machine that does much else (1.06 was seen),
below the deadlines that somebody's waiting would have."""


class _Notes(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.slow: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if " took " in record.getMessage():  # asyncio's words for it, in debug mode
            self.slow.append(record.getMessage())


def run(main: Coroutine[Any, Any, None]) -> None:
    """As asyncio.run. Raises AssertionError naming the callbacks that blocked."""
    notes, logger = _Notes(), logging.getLogger("asyncio")
    logger.addHandler(notes)
    try:
        with asyncio.Runner(debug=True) as runner:
            runner.get_loop().slow_callback_duration = LONGEST
            runner.run(main)
    finally:
        logger.removeHandler(notes)
    assert not notes.slow, f"the event loop was blocked: {notes.slow}"
