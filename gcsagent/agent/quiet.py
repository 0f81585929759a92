"""Whether requests that change something are let in, and which are under way.

While a snapshot of the VM is being made nothing new begins: the runtime's calls would meet frozen file
systems, and what is half done would be half done in every copy.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from typing import Any

from protocol.errors import Code, RpcError


class Quiet:
    def __init__(self) -> None:
        self._snapshot = ""
        self._numbers = itertools.count(1)
        self._under_way: dict[int, str] = {}
        self._ended = asyncio.Event()

    def begin(self, snapshot: str) -> None:
        """From now on nothing is let in."""
        self._snapshot = snapshot

    def end(self) -> None:
        self._snapshot = ""

    def refusal(self, method: str) -> RpcError | None:
        """Why a request that changes something is not carried out now; None: it is."""
        if not self._snapshot or method in _passing():
            return None
        return RpcError(
            Code.FAILED_PRECONDITION,
            f"snapshot {self._snapshot} of this guest is being made: try again when guest.resumed has come",
            snapshot=self._snapshot,
        )

    def counted(self, method: str, answer: Callable[[Any], None]) -> Callable[[Any], None]:
        """``answer`` for a request that is let in: it is under way until that is called."""
        if method in _passing():
            return answer
        number = next(self._numbers)
        self._under_way[number] = method

        def answered(result: Any) -> None:
            self._under_way.pop(number, None)
            self._ended.set()
            answer(result)

        return answered

    async def settled(self, seconds: float, others: Iterable[asyncio.Task[None]]) -> list[str]:
        """Waits until what was let in has ended, and ``others``; what is under way after ``seconds``."""
        left = {*others}
        watching = [asyncio.ensure_future(self._none_left())]
        try:
            await asyncio.wait((*left, *watching), timeout=seconds, return_when=asyncio.ALL_COMPLETED)
        finally:
            watching[0].cancel()
        methods = Counter(self._under_way.values())
        busy = [f"{method} ({count})" if count > 1 else method for method, count in methods.items()]
        return busy + ["work of the agent's own"] * any(not task.done() for task in left)

    async def _none_left(self) -> None:
        while self._under_way:
            self._ended.clear()
            await self._ended.wait()


def _passing() -> Collection[str]:
    from protocol.families.snapshot import PASSING  # asked for while a snapshot is made, and not before

    return PASSING
