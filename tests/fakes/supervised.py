"""A supervisor in a process of its own, and the agent's end of its channel in the test's hands."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gcsagent.common import channel

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SECONDS = 20.0
"""Bound of every wait: far more than anything here takes, so that only a fault reaches it."""


SPIN = 255
"""What makes a puppet spin (puppet_agent)."""


class Refused(Exception):
    """The supervisor answered with an error."""

    def __init__(self, errno: int, message: str) -> None:
        super().__init__(message)
        self.errno = errno


def eventually(holds: Callable[[], bool], what: str) -> None:
    """For facts that no descriptor tells of, such as a zombie having been reaped."""
    deadline = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < deadline, f"never came true: {what}"
        time.sleep(0.005)


def state_of(pid: int) -> str:
    """``Z`` for a zombie and so on, as in proc(5); ``""`` when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


class Puppet:
    """One agent process; its end of the channel is ours."""

    def __init__(self, strings: socket.socket) -> None:
        strings.settimeout(SECONDS)
        introduction, fds, _, _ = socket.recv_fds(strings, 100, 1)
        self._strings = strings
        pid, generation = introduction.split()
        self.pid, self.generation = int(pid), int(generation)
        self.pidfd = os.pidfd_open(self.pid)
        self.channel = socket.socket(fileno=fds[0])
        self.channel.settimeout(SECONDS)
        self.notes: list[list[Any]] = []
        self._answers: dict[int, tuple[list[Any], list[int]]] = {}
        self._ident = 0

    def send(self, operation: object, arguments: object, fds: tuple[int, ...] = ()) -> int:
        self._ident += 1
        channel.send(self.channel, channel.pack([self._ident, operation, arguments]), fds)
        return self._ident

    def answer(self, ident: int) -> tuple[Any, list[int]]:
        """The answer to one request, whatever comes before it. Raises Refused."""
        while ident not in self._answers:
            self._receive()
        (_, error, result), fds = self._answers.pop(ident)
        if error is not None:
            raise Refused(error["errno"], error["message"])
        return result, fds

    def ask(self, operation: object, arguments: object, fds: tuple[int, ...] = ()) -> Any:
        result, received = self.answer(self.send(operation, arguments, fds))
        channel.close_all(received)
        return result

    def note(self, topic: str) -> dict[str, Any]:
        """The next notification of a topic."""
        while not (found := [note for note in self.notes if note[1] == topic]):
            self._receive()
        self.notes.remove(found[0])
        data: dict[str, Any] = found[0][2]
        return data

    def _receive(self) -> None:
        received = channel.receive(self.channel)
        assert received is not None, "the supervisor closed the channel"
        message, fds = received
        if message[0] is None:
            self.notes.append(message)
        else:
            self._answers[message[0]] = (message, fds)

    def end(self, status: int | None = None) -> None:
        """Ends with ``status``, or by SIGKILL. What was sent before is the supervisor's to take."""
        if status is None:
            os.kill(self.pid, signal.SIGKILL)
        else:
            self._strings.send(bytes([status]))
        self.close()

    def spin(self) -> None:
        """Busy for ever, as a fault in the agent would be."""
        self._strings.send(bytes([SPIN]))

    def close(self) -> None:
        self.channel.close()
        self._strings.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1

    def ended(self) -> bool:
        """Waits for the process to end."""
        return bool(select.select([self.pidfd], [], [], SECONDS)[0])


class Supervised:
    """``with Supervised(tmp_path) as supervised:``; a test fails if it does not stop when told to."""

    def __init__(self, tmp_path: Path, guest: bool = False, env: dict[str, str] | None = None) -> None:
        self.directory = tmp_path
        self.state = tmp_path / "state"
        self.state.mkdir()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(tmp_path / "puppets"))
        self._listener.listen(8)
        self._listener.settimeout(SECONDS)
        puppet = tmp_path / "puppet"
        puppet.write_text(
            f'#!/bin/sh\nexec "{sys.executable}" -S -X faulthandler "{HERE / "puppet_agent.py"}"\n'
        )
        puppet.chmod(0o755)
        self._puppets: list[Puppet] = []
        self.log = tmp_path / "log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    str(HERE / "supervisor_driver.py"),
                    str(self.state),
                    str(puppet),
                    *(["guest"] if guest else []),
                ],
                env={
                    **os.environ,
                    "PYTHONPATH": str(ROOT),
                    "PUPPET_SOCKET": str(tmp_path / "puppets"),
                    **(env or {}),
                },
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
            )

    def __enter__(self) -> Supervised:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self.process.poll() is None:
                for puppet in self._puppets:
                    puppet.close()
                self.process.terminate()
                self.process.wait(5)
        finally:
            self.process.kill()
            self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()
            self._listener.close()
            for puppet in self._puppets:
                puppet.close()

    def agent(self, ready: bool = True) -> Puppet:
        """The next agent that is started."""
        strings, _ = self._listener.accept()
        puppet = Puppet(strings)
        self._puppets.append(puppet)
        if ready:
            puppet.ask("ready", {})
        return puppet

    def logged(self) -> str:
        return self.log.read_text(errors="replace")

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def children(self) -> list[int]:
        pid = self.process.pid
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def wait(self) -> int:
        return self.process.wait(SECONDS)

    # -- runtime calls ----------------------------------------------------------------------------

    def spawn(self, puppet: Puppet, way: str, argument: str = "", *, call: str = "call", **extra: Any) -> int:
        """Starts the fake runtime; its process is claimed as ``c/p`` from the file ``pid``."""
        pid_file = self.directory / f"{call}.pid"
        runtime = [sys.executable, "-S", str(HERE / "fake_runtime.py"), way, str(pid_file), argument]
        fds = extra.pop("sent", ())
        arguments = {
            "call": call,
            "argv": runtime,
            "env": {"PATH": os.environ["PATH"]},
            "process": "c/p",
            "pid_file": str(pid_file),
            "timeout": SECONDS,
            **extra,
        }
        return puppet.send("spawn", arguments, fds)
