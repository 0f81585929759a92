"""Keeps an agent running: starts it, notices its death or that it is stuck, starts it again.

A death after READY is answered at once, unless it comes soon and again and again; one before READY counts
towards a crash loop (:mod:`gcsagent.supervisor.backoff`). An agent that exits with EX_CONFIG says that trying
again cannot help.
"""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import Callable

from gcsagent.common import channel
from gcsagent.common.loop import Loop, Timer
from gcsagent.supervisor.backoff import BackOff
from gcsagent.supervisor.log import log
from gcsagent.supervisor.reaper import Reaper
from gcsagent.supervisor.spawn import spawn_watched
from gcsagent.supervisor.watchdog import Watchdog

EX_CONFIG = 78
"""sysexits.h: the agent cannot work with the settings it was given."""

CHANNEL_FD = 3
END_SECONDS = 5.0
"""What an agent may take to exit once its channel is closed; its exit status is worth waiting for."""
DEATH_SECONDS = 3.0
"""What SIGKILL may take to end it, before it is taken to be held up in the kernel."""


class AgentProcess:
    def __init__(
        self,
        loop: Loop,
        reaper: Reaper,
        env: dict[str, str],
        connected: Callable[[socket.socket], None],
        ended: Callable[[int], None],
        free: Callable[[int, bool], None],
        watchdog: float = 0.0,
    ) -> None:
        """``connected`` gets each new agent's channel; ``ended`` its wait status; ``free`` the pid of one
        that SIGKILL has not ended in time, and whether that has been so before.

        ``watchdog``: seconds of silence after which an agent is ended; 0 is never.
        """
        self._loop, self._reaper, self._env = loop, reaper, env
        self._connected, self._ended, self._free = connected, ended, free
        self._pidfd = -1
        self._watchdog = Watchdog(loop, watchdog, self._signal)
        self._retry: Timer | None = None
        self._death: Timer | None = None
        self._backoff = BackOff()
        self._killed = False
        self.code = ""
        """Directory the agent's code is in; "" is what was installed."""
        self.log_level = ""
        """What it logs from; "" is what the settings say."""
        self.pid = 0
        self.generation = 0
        self.ready = False

    def start(self) -> None:
        """Starts an agent. Raises OSError when the interpreter itself cannot be started."""
        self.generation += 1
        self.ready = self._killed = False
        self._backoff.started()
        ours, theirs = channel.pair()
        env = {**self._env, "GCS_CHANNEL_FD": str(CHANNEL_FD), "GCS_GENERATION": str(self.generation)}
        env["GCS_CODE"], env["GCS_LOG_LEVEL"] = self.code, self.log_level
        if self.code:
            env["PYTHONPATH"] = f"{self.code}:{env.get('PYTHONPATH', '')}"
        # faulthandler from the first instruction on: an agent may hang in an import, too.
        argv = [sys.executable, "-P", "-X", "faulthandler", "-m", "gcsagent.agent"]
        try:
            fds = {1: 2, 2: 2, CHANNEL_FD: theirs.fileno()}
            self.pid, self._pidfd = spawn_watched(argv, env, fds)
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        self._reaper.own.add(self.pid)
        self._loop.watch(self._pidfd, lambda _events: self._on_exit())
        self._watchdog.started()
        self._connected(ours)

    def set_ready(self) -> None:
        self.ready = True
        self._backoff.ready()
        self._watchdog.ready()

    def alive(self) -> None:
        """Its event loop goes round."""
        self._watchdog.alive()

    def kill(self) -> None:
        self._killed = True
        self._signal(signal.SIGKILL)

    def abort(self, reason: str) -> None:
        """Ends it with its stacks in the log."""
        self._watchdog.abort(reason)

    def _signal(self, number: signal.Signals) -> None:
        if self.pid:
            signal.pidfd_send_signal(self._pidfd, number)
            if number is signal.SIGKILL:
                self._expect_death(again=False)

    def _expect_death(self, again: bool) -> None:
        if self._death is not None:
            self._death.cancel()
        self._death = self._loop.after(DEATH_SECONDS, lambda: self._still_there(again))

    def _still_there(self, again: bool) -> None:
        self._free(self.pid, again)
        self._expect_death(again=True)

    def stop(self) -> None:
        """Kills it and starts no other."""
        if self._retry is not None:
            self._retry.cancel()
        self.kill()

    def expect_end(self) -> None:
        """It has closed its channel, which a dying agent does: one that lives on is of no use."""
        if self.pid:
            generation = self.generation
            self._loop.after(END_SECONDS, lambda: self.kill() if self.generation == generation else None)

    def restart(self, code: int) -> None:
        """Starts the next agent, at once or after the back-off that the last ones have earned.

        ``code``: how this one ended, its exit status or the signal's negative number.
        """
        delay = self._backoff.ended(from_outside=code == -signal.SIGKILL and not self._killed)
        if not delay:
            self.start_again()
            return
        if self.ready:
            said, count = "the agent ended soon after it was ready, again", self._backoff.short_lives
        else:
            said, count = "the agent ended before it was ready", self._backoff.failures
        log("warning", said, failures=count, retry_in_s=delay)
        self._retry = self._loop.after(delay, self.start_again)

    def start_again(self) -> None:
        """Starts the next agent at once; if that cannot be, tries again later."""
        try:
            self.start()
        except OSError as error:
            log("error", "the agent cannot be started", error=str(error))
            self.restart(-1)

    def _on_exit(self) -> None:
        ended = self._reaper.take_end(self.pid, self._pidfd, self._on_exit)
        if ended is None:
            return
        self._watchdog.ended()
        if self._death is not None:
            self._death.cancel()
            self._death = None
        self._reaper.own.discard(self.pid)
        self._pidfd, self.pid = -1, 0
        self._ended(ended[0])

    @property
    def failures(self) -> int:
        """Deaths in a row before READY."""
        return self._backoff.failures
