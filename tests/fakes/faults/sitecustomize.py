"""Kills an agent at a chosen step: put this folder on its module path.

Python's audit events are the steps: each is raised right before the agent makes, links, renames or removes a
file or directory, opens a file for writing, or sends descriptors to the supervisor. ``fault`` beside
the state directory holds how many of them may still happen; the agent that takes it up counts down and
kills itself at the last. The product knows nothing of this.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

_STEPS = {"os.rename", "os.mkdir", "os.remove", "os.link", "os.rmdir", "socket.sendmsg", "open"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def _install(path: str) -> None:
    with open(path, encoding="ascii") as file:
        left = int(file.read())
    os.unlink(path)
    trace = open(path + ".steps", "w", encoding="utf-8", buffering=1)  # noqa: SIM115

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event not in _STEPS or (event == "open" and not (arguments[2] or 0) & _WRITING):
            return
        left -= 1
        trace.write(f"{left} {event} {arguments[:2]!r:.150}\n")
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _watch(path: str) -> None:
    """The fault is armed while the agent runs: SIGUSR2 has it take up the file."""
    signal.signal(signal.SIGUSR2, lambda *_: _install(path))


if "GCS_GENERATION" in os.environ:
    _watch(os.path.join(os.path.dirname(json.loads(os.environ["GCS_SETTINGS"])["state"]), "fault"))
