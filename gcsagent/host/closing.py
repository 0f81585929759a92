"""What ``async with`` closes at its end, and what closing does to those who wait just then."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Self

from gcsagent.host.errors import ClosedByUs


class Closing(ABC):
    @abstractmethod
    async def aclose(self) -> None: ...

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


class Closable:
    """A wait in ``async with closable():`` ends with ClosedByUs as soon as :meth:`close` is called.

    Attributes:
        closed: whether it has been.
    """

    def __init__(self, what: str) -> None:
        self.closed = False
        self._what = what
        self._limits: set[asyncio.Timeout] = set()

    @property
    def waiting(self) -> bool:
        """Somebody is in there."""
        return bool(self._limits)

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        for limit in self._limits:
            limit.reschedule(asyncio.get_running_loop().time())

    def check(self) -> None:
        """Raises ClosedByUs."""
        if self.closed:
            raise ClosedByUs(f"{self._what} has been closed by this side")

    @asynccontextmanager
    async def __call__(self) -> AsyncIterator[None]:
        self.check()
        try:
            # Not a task for each wait: there is one for each event.
            async with asyncio.timeout(None) as limit:
                self._limits.add(limit)
                try:
                    yield
                finally:
                    self._limits.discard(limit)
        except TimeoutError:
            self.check()
            raise
