"""The record of what is opened and closed: lines for the supervisor's log, and so for the agent's."""

from __future__ import annotations

import json
import socket
import sys
from typing import Any

from gcsagent.common import channel

NAME = "shell"
MAX_TEXT = 512
"""Characters of one value: a command line is the host's, and may be long."""


class Journal:
    def __init__(self, sock: socket.socket) -> None:
        """``sock`` is this end of a channel of common.channel; that it ends says that the supervisor has."""
        sock.setblocking(False)
        self._sock = sock

    def fileno(self) -> int:
        return self._sock.fileno()

    def write(self, level: str, message: str, **fields: Any) -> None:
        """Never waits: what the supervisor has no time for goes to standard error, the console in a guest."""
        short = {name: _short(value) for name, value in fields.items() if value not in ("", None)}
        try:
            channel.send(self._sock, channel.pack([level, message, short]))
        except OSError:
            line = {"level": level, "name": NAME, "message": message, **short}
            print(json.dumps(line), file=sys.stderr, flush=True)


def _short(value: Any) -> Any:
    if isinstance(value, int | float):
        return value
    text = value if isinstance(value, str) else " ".join(value)
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + "…"
