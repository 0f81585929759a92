"""Signals to this program, handled in a block: as before behind it, and ignored where they shall be."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

Handler = Callable[[signal.Signals], object]

_stacks: dict[signal.Signals, list[Handler]] = {}
"""The event loop knows but the last handler of a signal."""


@contextmanager
def handled(numbers: Iterable[signal.Signals], handler: Handler) -> Iterator[None]:
    """``handler`` gets each of these that comes, in the event loop, in place of who got it before.

    Who starts us may have had some ignored (nohup(1), a job in the background of a script): they stay so.
    """
    before: dict[signal.Signals, Any] = {}
    try:
        for number in numbers:
            found = signal.getsignal(number)
            if found is not signal.SIG_IGN:
                before[number] = found
                _stacks.setdefault(number, []).append(handler)
                _install(number)
        yield
    finally:
        for number, found in before.items():
            _stacks[number].pop()
            if _stacks[number]:
                _install(number)
            else:
                del _stacks[number]
                asyncio.get_running_loop().remove_signal_handler(number)
                if found is not None:
                    signal.signal(number, found)


def _install(number: signal.Signals) -> None:
    asyncio.get_running_loop().add_signal_handler(number, _stacks[number][-1], number)
