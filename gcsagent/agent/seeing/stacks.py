"""agent.stacks: where every thread and every task of the agent is."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections import defaultdict
from types import FrameType
from typing import Any

from gcsagent.agent.call import Call
from protocol.families.diagnostics import Stacks
from protocol.method import Empty

MAX_FRAMES, MAX_NAMES, MAX_TEXT = 64, 8, 256 << 10


def stacks(_params: Empty, _call: Call) -> Stacks:
    """Outermost call first. Tasks that stand in the same place are shown once, with how many they are."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = [
        f"thread {names.get(ident, '?')} ({ident}):\n{_lines(_of_thread(frame))}"
        for ident, frame in sys._current_frames().items()
    ]
    same = defaultdict[str, list[str]](list)
    for task in asyncio.all_tasks():
        same[_lines(_of_task(task))].append(task.get_name())
    for lines, tasks in sorted(same.items(), key=lambda item: -len(item[1])):
        more = f" and {len(tasks) - MAX_NAMES} more" if len(tasks) > MAX_NAMES else ""
        what = "task" if len(tasks) == 1 else f"{len(tasks)} tasks"
        parts.append(f"{what} {', '.join(tasks[:MAX_NAMES])}{more}:\n{lines}")
    text = "\n".join(parts)
    return Stacks(text[:MAX_TEXT], len(text) > MAX_TEXT)


def _of_thread(frame: FrameType | None) -> list[str]:
    found: list[str] = []
    while frame is not None and len(found) < MAX_FRAMES:
        found.append(_place(frame))
        frame = frame.f_back
    return found[::-1]


def _of_task(task: asyncio.Task[Any]) -> list[str]:
    """Task.get_stack() has the outermost coroutine only; what it awaits hangs on it."""
    found: list[str] = []
    waiting: Any = task.get_coro()
    while waiting is not None and len(found) < MAX_FRAMES:
        frame = getattr(waiting, "cr_frame", None) or getattr(waiting, "gi_frame", None)
        if frame is None:
            found.append(f"waits for {type(waiting).__name__}")
            break
        found.append(_place(frame))
        waiting = getattr(waiting, "cr_await", None) or getattr(waiting, "gi_yieldfrom", None)
    return found


def _place(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_qualname}"


def _lines(places: list[str]) -> str:
    return "".join(f"    {place}\n" for place in places)
