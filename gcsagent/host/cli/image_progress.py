"""How far an image has been unpacked, on one line of a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from gcsagent.host.cli.resources import size as sized
from gcsagent.host.image.trees import Progress

_EVERY_SECONDS = 0.1
_WIPE = "\r\x1b[K"


@contextmanager
def shown_progress() -> Iterator[Progress]:
    """Nothing is shown where standard error is no terminal, and nothing is left on it at the end."""
    if not sys.stderr.isatty():
        yield lambda _what, _done, _size: None
        return
    last, when = "", 0.0

    def show(what: str, done: int, size: int) -> None:
        nonlocal last, when
        now = time.monotonic()
        if what == last and now - when < _EVERY_SECONDS and done != size:
            return
        last, when = what, now
        amount = f": {sized(done)} of {sized(size)}" if size else ""
        sys.stderr.write(f"{_WIPE}{what}{amount}")
        sys.stderr.flush()

    try:
        yield show
    finally:
        if last:
            sys.stderr.write(_WIPE)
            sys.stderr.flush()
