"""The debug shell's port: listened on here, served by a process that is started when somebody connects.

So the port costs nothing until it is used, and no connection is refused between two of these processes: it
waits in the listening socket, which both hold. One that fails is started again when there is a connection,
and not before the back-off that its failures have earned.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable

from gcsagent.common import channel
from gcsagent.common.loop import Loop, Timer
from gcsagent.listening import listen_unix, listen_vsock
from gcsagent.supervisor.backoff import delay_after
from gcsagent.supervisor.log import LEVELS, log
from gcsagent.supervisor.reaper import Reaper
from gcsagent.supervisor.spawn import spawn_watched

TYPE_CHECKING = False  # typing itself is half a megabyte
if TYPE_CHECKING:
    from typing import Any

LISTENER_FD, CHANNEL_FD = 3, 4
LONGEST_DELAY = 5.0
NAME = "shell"
BURST = 16
"""Lines taken in one wake-up."""

MAX_LAST_LINES = 1024
"""More than its socket holds."""

MAX_MESSAGE = 200
_OURS = frozenset(("time", "time_ns", "level", "message", "name", "number"))


class ShellProcess:
    def __init__(
        self, loop: Loop, reaper: Reaper, env: dict[str, str], address: str, ended: Callable[[], None]
    ) -> None:
        """``address`` is ``vsock:PORT`` or ``unix:PATH``. Raises OSError when it cannot be listened on."""
        self._loop, self._reaper, self._env, self._ended = loop, reaper, env, ended
        kind, _, where = address.partition(":")
        self._path = where if kind == "unix" else ""
        self._listener = listen_unix(where) if self._path else listen_vsock(int(where))
        self._channel: socket.socket | None = None
        self._pidfd = -1
        self._failures = self._generation = 0
        self._stopping = False
        self._retry: Timer | None = None
        self.pid = 0
        self._await_connection()

    def stop(self) -> None:
        """Has its shells end, and starts no other."""
        self._stopping = True
        if self._retry is not None:
            self._retry.cancel()
        self._loop.forget(self._listener.fileno())
        self._listener.close()
        if self._path:
            try:
                os.unlink(self._path)
            except OSError as error:
                log("warning", "the debug shell's socket cannot be removed", error=str(error))
        if self.pid:
            signal.pidfd_send_signal(self._pidfd, signal.SIGTERM)

    def _await_connection(self) -> None:
        self._loop.watch(self._listener.fileno(), lambda _events: self._start())

    def _start(self) -> None:
        self._loop.forget(self._listener.fileno())
        try:
            ours = self._spawn()
        except OSError as error:
            log("error", "the debug shell cannot be started", error=str(error))
            self._wait_and_retry()
            return
        self._generation += 1
        self._reaper.own.add(self.pid)
        self._loop.watch(self._pidfd, lambda _events: self._on_exit())
        ours.setblocking(False)
        self._channel = ours
        self._loop.watch(ours.fileno(), lambda _events: self._take_lines())

    def _spawn(self) -> socket.socket:
        """Starts the process; our end of its channel. Raises OSError."""
        ours, theirs = channel.pair()
        env = {**self._env, "GCS_GENERATION": str(self._generation + 1)}
        fds = {1: 2, 2: 2, LISTENER_FD: self._listener.fileno(), CHANNEL_FD: theirs.fileno()}
        try:
            self.pid, self._pidfd = spawn_watched([sys.executable, "-P", "-m", "gcsagent.shell"], env, fds)
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        return ours

    def _on_exit(self) -> None:
        self._take_lines(MAX_LAST_LINES)
        self._drop_channel()
        ended = self._reaper.take_end(self.pid, self._pidfd, self._on_exit)
        if ended is None:
            return
        status = ended[0]
        self._reaper.own.discard(self.pid)
        self._pidfd, self.pid = -1, 0
        if self._stopping:
            self._ended()
        elif status == 0:
            self._failures = 0
            self._await_connection()
        else:
            code = os.waitstatus_to_exitcode(status)
            log("error", "the debug shell's process failed, and its shells with it", status=code)
            self._wait_and_retry()

    def _wait_and_retry(self) -> None:
        self._failures += 1
        self._retry = self._loop.after(delay_after(self._failures, LONGEST_DELAY), self._await_connection)

    # -- its log --------------------------------------------------------------------------------

    def _take_lines(self, most: int = BURST) -> None:
        for _ in range(most):
            if self._channel is None or not self._take_line(self._channel):
                return

    def _take_line(self, sock: socket.socket) -> bool:
        """Whether there may be another."""
        try:
            received = channel.receive(sock)
        except BlockingIOError:
            return False
        except (channel.ChannelError, OSError) as error:
            log("error", "a broken line from the debug shell", error=str(error))
            received = None
        if received is None:
            self._drop_channel()
            return False
        message, fds = received
        channel.close_all(fds)
        _log_line(message)
        return True

    def _drop_channel(self) -> None:
        if self._channel is not None:
            self._loop.forget(self._channel.fileno())
            self._channel.close()
            self._channel = None


def _log_line(line: list[Any]) -> None:
    """``[level, message, fields]``; anything else is not worth a line."""
    level, message, fields = line
    if isinstance(level, str) and level in LEVELS and isinstance(message, str) and isinstance(fields, dict):
        kept = {name: value for name, value in fields.items() if isinstance(name, str) and name not in _OURS}
        log(level, message[:MAX_MESSAGE], **kept, name=NAME)
