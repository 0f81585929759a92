"""One process that a shell is, whatever it is on, and everybody in its session."""

from __future__ import annotations

import contextlib
import os
import signal
from abc import ABC, abstractmethod


class Child(ABC):
    """``pid`` is our child: the process, or what waits for it (gcsagent.shell.enter).

    ``session`` is that of the process, once it is known to be another. What it writes is read from
    ``source``, what it is to read goes to ``sink``, neither of which blocks; -1: no more.
    """

    def __init__(self, pid: int, source: int, sink: int) -> None:
        self.pid = self.session = pid
        self.source, self.sink = source, sink

    @abstractmethod
    def resize(self, rows: int, cols: int) -> None: ...

    @abstractmethod
    def end_input(self) -> None: ...

    @abstractmethod
    def close(self) -> None:
        """Lets go of both ends."""

    def signal(self, *numbers: signal.Signals) -> int:
        """Sends them to everybody in the session; returns how many those are."""
        count = 0
        for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
            with contextlib.suppress(OSError):
                pidfd = os.pidfd_open(pid)
                try:
                    if _session_of(pid) == self.session:
                        count += 1
                        for number in numbers:
                            signal.pidfd_send_signal(pidfd, number)
                finally:
                    os.close(pidfd)
        return count


def _session_of(pid: int) -> int:
    """0 for a zombie, which no signal concerns. Raises OSError."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        state, _, _, session, *_ = file.read().rpartition(b")")[2].split()
    return 0 if state in (b"Z", b"X") else int(session)
