"""Locks between gcsctls of one machine."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import tenacity

from gcsagent.host.image.errors import Busy


async def lock(opened: Callable[[], int], path: Path, seconds: float, waiting: Callable[[], None]) -> int:
    """A descriptor of ``path``, from ``opened``, that is locked until it is closed.

    A holder may remove ``path``; who has waited for it opens it anew. ``waiting`` is called before each wait.
    Raises Busy after ``seconds``, and what ``opened`` raises. flock(2) would wait by itself, but a thread
    in it cannot be told to stop.
    """

    async def attempt() -> int:
        fd = opened()
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(fd), path.stat()):
                raise FileNotFoundError(path)
        except BaseException:
            os.close(fd)
            raise
        return fd

    retrying = tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception_type((BlockingIOError, FileNotFoundError)),
        wait=tenacity.wait_exponential(multiplier=0.01, max=0.5),
        stop=tenacity.stop_after_delay(seconds),
        before_sleep=lambda _state: waiting(),
        reraise=True,
    )
    try:
        return await retrying(attempt)
    except (BlockingIOError, FileNotFoundError):
        raise Busy(f"another gcsctl holds {path} for more than {seconds:g} s; try again") from None
