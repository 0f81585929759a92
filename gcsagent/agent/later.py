"""Services of the agent that are imported and made when the first request for one comes.

An agent that nobody has asked for a mount has nothing of storage in its memory, and is ready the sooner. Its
code's directory stays for as long as it runs: in an image nothing changes, and ``agent.upgrade`` puts new
code beside the old (gcsagent.agent.upgrade).
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

from gcsagent.agent.call import Call
from protocol.errors import Code, RpcError

T = TypeVar("T")
Handler = Callable[[Any, Call], Any | Awaitable[Any]]

_log = logging.getLogger("agent.later")


class Unloaded:
    """Stands for a handler whose service is not there yet."""

    def __init__(self, load: Callable[[], Handler]) -> None:
        self.load = load
        """Raises RpcError."""


class Later(Generic[T]):
    """One such service. ``make`` imports its module and makes it."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self.made: T | None = None
        """It, once somebody has asked for it."""

    def get(self) -> T:
        """Raises UNAVAILABLE when it cannot be loaded: short of memory, of descriptors. The next may."""
        if self.made is None:
            try:
                self.made = self._make()
            except Exception as error:
                _log.error("a part of the agent cannot be loaded", exc_info=error)
                raise RpcError(
                    Code.UNAVAILABLE,
                    f"a part of the agent cannot be loaded ({type(error).__name__}: {error}); try again,"
                    " with more memory free in the guest",
                    errno=getattr(error, "errno", None) or 0,
                ) from error
        return self.made

    def handler(self, pick: Callable[[T], Handler]) -> Unloaded:
        return Unloaded(lambda: pick(self.get()))
