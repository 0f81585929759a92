"""One process on a pseudo-terminal, by ptyprocess; and everybody in its session."""

from __future__ import annotations

import contextlib
import os
import signal
import sys

from gcsagent.shell.enter import EXIT_FAILED, Plan, enter


class Terminal:
    """``pid`` is our child: the process, or what waits for it (gcsagent.shell.enter).

    ``session`` is that of the process, once it is known to be another.

    ptyprocess makes terminal and child; waiting, reading and writing are the event loop's: its own wait.
    """

    def __init__(self, plan: Plan, rows: int, cols: int) -> None:
        """Raises OSError. Whatever goes wrong in the child is in the plan's report."""
        from ptyprocess import PtyProcess

        parent = os.getpid()
        keep = [fd for fd in (plan.report, plan.pidfd, plan.root) if fd >= 0]
        try:
            # The program named here is never executed: enter() does that, as seen from where it is then.
            self._pty = PtyProcess.spawn(
                [sys.executable], preexec_fn=lambda: enter(plan), dimensions=(rows, cols), pass_fds=keep
            )
        finally:
            if os.getpid() != parent:
                os._exit(EXIT_FAILED)
        self.pid: int = self._pty.pid
        self.session = self.pid
        self.fd: int = self._pty.fd
        os.set_inheritable(self.fd, False)
        os.set_blocking(self.fd, False)

    def resize(self, rows: int, cols: int) -> None:
        self._pty.setwinsize(rows, cols)

    def close(self) -> None:
        """To the processes on it, that is a hang-up (tty_ioctl(4))."""
        if self.fd >= 0:
            self.fd = -1
            self._pty.fileobj.close()
            self._pty.closed = True  # its own close() would wait, and kill

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
