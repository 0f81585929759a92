"""The watchdog: agents that are silent, stuck, stopped or deaf, with real processes and real signals."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from gcsagent.common import channel
from gcsagent.common.loop import Loop
from gcsagent.supervisor import watchdog
from gcsagent.supervisor.watchdog import Watchdog
from tests.fakes.supervised import Puppet, Supervised

SHORT = {"DRIVER_WATCHDOG": "0.6"}
"""Long enough for a busy machine to start a puppet in START_FACTOR times as much."""


def alive(puppet: Puppet) -> None:
    channel.send(puppet.channel, channel.pack([None, "alive", {}]))


def test_a_busy_agent_leaves_its_stacks_and_has_a_successor(tmp_path: Path) -> None:
    with Supervised(tmp_path, env=SHORT) as supervised:
        stuck = supervised.agent()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            stuck.ask("hold", {"hold": {"conn": 0}}, (theirs.fileno(),))
        alive(stuck)
        stuck.spin()
        successor = supervised.agent()
        assert successor.ask("list", {"kind": "names"}) == ["conn"]
        log = supervised.logged()
        assert "no sign of life for 0." in log
        assert "in busy_for_ever" in log
        assert f'"status": {-signal.SIGABRT}, "ready": true' in log


def test_a_stopped_agent_is_woken_to_write_its_stacks(tmp_path: Path) -> None:
    with Supervised(tmp_path, env=SHORT) as supervised:
        stopped = supervised.agent()
        alive(stopped)
        os.kill(stopped.pid, signal.SIGSTOP)
        assert supervised.agent().generation == 2
        assert stopped.ended()
        assert "Fatal Python error: Aborted" in supervised.logged()


def test_one_that_takes_no_abort_is_killed(tmp_path: Path) -> None:
    with Supervised(tmp_path, env={**SHORT, "PUPPET_DEAF": "1"}) as supervised:
        deaf = supervised.agent()
        alive(deaf)
        deaf.spin()
        assert supervised.agent().generation == 2
        assert f'"status": {-signal.SIGKILL}' in supervised.logged()


def test_one_that_never_becomes_ready_is_ended_and_counts_as_a_crash(tmp_path: Path) -> None:
    with Supervised(tmp_path, env=SHORT) as supervised:
        hanging = supervised.agent(ready=False)
        assert hanging.ended()
        assert supervised.agent(ready=False).generation == 2
        assert '"failures": 1' in supervised.logged()


def test_an_agent_that_says_so_lives(tmp_path: Path) -> None:
    with Supervised(tmp_path, env={"DRIVER_WATCHDOG": "1"}) as supervised:
        puppet = supervised.agent()
        until = time.monotonic() + 2.5
        while time.monotonic() < until:
            alive(puppet)
            puppet.ask("list", {"kind": "names"})
        assert "aborted" not in supervised.logged()
        supervised.process.terminate()
        assert puppet.note("shutdown")["action"] == "exit"


def test_without_a_deadline_silence_is_no_fault(tmp_path: Path) -> None:
    with Supervised(tmp_path) as supervised:
        puppet = supervised.agent()
        alive(puppet)
        assert puppet.ask("list", {"kind": "names"}) == []
        assert "aborted" not in supervised.logged()


# -- alone ------------------------------------------------------------------------------------------


class Watched:
    """A watchdog on a loop that ends with the first SIGKILL, and what it sent."""

    def __init__(self, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(watchdog, "DUMP_SECONDS", 0.05)
        self.sent: list[signal.Signals] = []
        self.loop = Loop()
        self.dog = Watchdog(self.loop, seconds, self._send)

    def _send(self, number: signal.Signals) -> None:
        self.sent.append(number)
        if number == signal.SIGKILL:
            self.loop.stop()


def test_abort_comes_first_then_what_lets_it_be_seen_then_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(0.05, monkeypatch)
    watched.dog.started()
    watched.dog.alive()
    watched.loop.run()
    assert watched.sent == [signal.SIGABRT, signal.SIGCONT, signal.SIGKILL]


def test_words_before_ready_are_not_enough_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(0.05, monkeypatch)

    def talk() -> None:
        watched.dog.alive()
        watched.loop.after(0.01, talk)

    before = time.monotonic()
    watched.dog.started()
    talk()
    watched.loop.run()
    assert time.monotonic() - before > 0.05 * watchdog.READY_FACTOR
    assert watched.sent == [signal.SIGABRT, signal.SIGCONT, signal.SIGKILL]


def test_words_behind_ready_are(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(0.05, monkeypatch)
    watched.dog.started()
    watched.dog.ready()
    rest = iter(range(150))

    def talk() -> None:
        watched.dog.alive()
        if next(rest, None) is None:
            watched.dog.ended()
            watched.loop.stop()
        watched.loop.after(0.01, talk)

    talk()
    watched.loop.run()
    assert watched.sent == []


def test_words_cost_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hostile agent may say any number of them."""
    watched = Watched(0.05, monkeypatch)
    watched.dog.started()
    for _ in range(10_000):
        watched.dog.alive()
    assert len(watched.loop._timers) < 5


def test_an_ended_agent_is_not_signalled(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(0.02, monkeypatch)
    watched.dog.started()
    watched.dog.ended()
    watched.dog.alive()
    watched.loop.after(0.3, watched.loop.stop)
    watched.loop.run()
    assert watched.sent == []


def test_a_machine_that_stood_still_says_nothing_about_the_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The supervisor itself comes far too late: the agent is listened to once more, for a whole deadline."""
    monkeypatch.setattr(watchdog, "LATE_SECONDS", 0.1)
    watched = Watched(0.05, monkeypatch)

    def stand_still() -> None:
        threading.Event().wait(0.4)

    watched.dog.started()
    watched.dog.alive()
    watched.loop.after(0.0, stand_still)
    before = time.monotonic()
    watched.loop.run()
    assert time.monotonic() - before > 0.4 + 0.05
    assert watched.sent == [signal.SIGABRT, signal.SIGCONT, signal.SIGKILL]
