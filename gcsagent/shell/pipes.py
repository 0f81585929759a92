"""One process on pipes: for scripts, whose input has an end that a terminal could only be typed."""

from __future__ import annotations

import os

from gcsagent.shell.child import Child
from gcsagent.shell.enter import EXIT_FAILED, Plan, enter


class Pipes(Child):
    def __init__(self, plan: Plan) -> None:
        """Raises OSError. Whatever goes wrong in the child is in the plan's report."""
        ends = [*os.pipe2(os.O_CLOEXEC)]
        try:
            ends += os.pipe2(os.O_CLOEXEC)
            pid = os.fork()
        except OSError:
            for fd in ends:
                os.close(fd)
            raise
        stdin, sink, source, stdout = ends
        if pid == 0:
            try:
                os.setsid()
                os.dup2(stdin, 0)
                os.dup2(stdout, 1)
                os.dup2(stdout, 2)
                enter(plan)
            finally:
                os._exit(EXIT_FAILED)
        os.close(stdin)
        os.close(stdout)
        for fd in (sink, source):
            os.set_blocking(fd, False)
        super().__init__(pid, source, sink)

    def resize(self, rows: int, cols: int) -> None:
        """There is nothing that has a size."""

    def end_input(self) -> None:
        if self.sink >= 0:
            os.close(self.sink)
            self.sink = -1

    def close(self) -> None:
        self.end_input()
        if self.source >= 0:
            os.close(self.source)
            self.source = -1
