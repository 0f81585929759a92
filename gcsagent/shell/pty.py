"""One process on a pseudo-terminal, by ptyprocess."""

from __future__ import annotations

import os
import sys

from gcsagent.shell.child import Child
from gcsagent.shell.enter import EXIT_FAILED, Plan, enter


class Terminal(Child):
    """ptyprocess makes terminal and child; reading, writing and waiting are the event loop's."""

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
        os.set_inheritable(self._pty.fd, False)
        os.set_blocking(self._pty.fd, False)
        super().__init__(self._pty.pid, source=self._pty.fd, sink=self._pty.fd)

    def resize(self, rows: int, cols: int) -> None:
        if self.source >= 0:
            self._pty.setwinsize(rows, cols)

    def end_input(self) -> None:
        """That is typed."""

    def close(self) -> None:
        """To the processes on it, that is a hang-up (tty_ioctl(4))."""
        if self.source >= 0:
            self.source = self.sink = -1
            self._pty.fileobj.close()
            self._pty.closed = True  # its own close() would wait, and kill
