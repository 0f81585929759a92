"""One JSON line per log entry, shaped like the agent's (gcsagent.agent.logs).

``logging`` and its JSON formatter would be a third of PID 1's memory for a dozen messages in a guest's life.
"""

from __future__ import annotations

import json
import os
import select
import time
from collections import deque
from collections.abc import Callable

TYPE_CHECKING = False  # typing itself is half a megabyte
if TYPE_CHECKING:
    from typing import Any

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
NAME = "supervisor"
_threshold = LEVELS["info"]
KEPT = 256
"""Lines kept for the agent, which copies them into a ring of its own."""
MAX_LINE = 2048
"""Characters of a kept line, in JSON; a longer one is kept without its fields."""
_kept: deque[dict[str, Any]] = deque(maxlen=KEPT)
_poke: Callable[[], None] | None = None
WAIT_SECONDS = 0.5
"""How long an entry waits for room; a pipe that has any takes PIPE_BUF bytes (pipe(7)), more than a line."""


def set_level(name: str) -> None:
    global _threshold
    _threshold = LEVELS[name]


def on_line(poke: Callable[[], None]) -> None:
    """Calls ``poke`` after each further line."""
    global _poke
    _poke = poke


def lines_after(number: int) -> list[dict[str, Any]]:
    """The lines kept that are numbered above ``number``, oldest first."""
    return [line for line in _kept if line["number"] > number]


def log(level: str, message: str, **fields: Any) -> None:
    """Writes one line to standard error; a full or closed one must not stop the supervisor.

    ``name`` among ``fields`` is who says so, if that is not the supervisor.
    """
    if LEVELS[level] < _threshold:
        return
    now = time.time_ns()
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now // 1_000_000_000))
    entry = {
        "time": f"{stamp}.{now % 1_000_000_000 // 1000:06d}Z",
        "level": level,
        "name": NAME,
        "message": message,
        **fields,
    }
    text = json.dumps(entry, default=str)
    _keep(now, level, message, text)
    try:
        if select.select([], [2], [], WAIT_SECONDS)[1]:
            os.write(2, (text + "\n").encode())
    except (OSError, ValueError):
        return


def _keep(now: int, level: str, message: str, text: str) -> None:
    fields = json.loads(text) if len(text) <= MAX_LINE else {}
    for name in ("time", "level", "message"):
        fields.pop(name, None)
    if fields.get("name") == NAME:
        del fields["name"]
    number = _kept[-1]["number"] + 1 if _kept else 1
    line = {"number": number, "time_ns": now, "level": level, "message": message[:MAX_LINE]}
    _kept.append({**fields, **line})
    if _poke is not None:
        _poke()
