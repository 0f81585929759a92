"""The supervisor, a process of its own, told anything by its agent."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import msgpack

from gcsagent.common import channel
from tests.cases.agents import children
from tests.fakes.supervised import Puppet, Refused, Supervised
from tests.fuzz.target import Broken

TIDY_EVERY = 200
MAX_FDS, GROWTH_KIB = 64, 32 << 10
"""Descriptors, and memory, beyond what it began with, once what it was given has been taken back."""

ENDS = ("stop", "stopping")
"""What would end it, which an agent may ask for."""

SPAWN = {"call": "c", "argv": ["true"], "env": {"PATH": os.environ["PATH"]}, "timeout": 5.0}
GOOD: tuple[tuple[str, Any], ...] = (
    ("spawn", SPAWN),
    ("spawn", {**SPAWN, "call": "d", "argv": ["sleep", "100"], "fds": {"0": 0, "1": 1}, "hold": {"h": 2}}),
    (
        "spawn",
        {
            **SPAWN,
            "call": "e",
            "process": "p",
            "pid_file": "/none",
            "console_path": "/c",
            "console_name": "t",
        },
    ),
    *((operation, {"call": "d"}) for operation in ("cancel", "join", "forget_call")),
    ("forget_process", {"process": "p"}),
    ("pidfd", {"process": "p"}),
    ("hold", {"hold": {"a": 0, "b": 1}}),
    ("fetch", {"names": ["a", "b"]}),
    ("release", {"names": ["a"]}),
    *(("list", {"kind": kind, "start": 0}) for kind in ("names", "calls", "processes", "exits")),
    ("log", {"after": 0}),
    ("log_level", {"level": "info"}),
    ("upgrade", {"path": "/x", "seconds": 1}),
    ("upgrade_status", {}),
    ("stats", {}),
    ("ready", {}),
    ("alive", {}),
)


class Channel:
    name, coverage = "channel", False

    def open(self, directory: Path) -> None:
        self._supervised = Supervised(directory)
        self._puppet = self._supervised.agent()
        self._count = 0
        self._tidy()
        self._fds, self._kib = self._supervised.descriptors(), self._memory()

    def close(self) -> None:
        self._puppet.ask("stats", {})
        self._look()
        with self._supervised:
            pass

    def seeds(self) -> list[bytes]:
        """The first byte says how many descriptors go with the packet."""
        found = [msgpack.packb([7, operation, arguments]) for operation, arguments in GOOD]
        found.append(msgpack.packb([None, "alive", {}]))
        return [b"\3" + packet for packet in found]

    def execute(self, data: bytes) -> Hashable:
        count, packet = (data[0] & 7 if data else 0), data[1:] or b"\x93"
        if _ends(packet):
            return None
        self._count += 1
        with open("/dev/null", "rb") as null:
            try:
                channel.send(self._puppet.channel, packet, (null.fileno(),) * count)
            except OSError as error:
                return "unsendable", error.errno
        outcome = self._outcome()
        if self._count % TIDY_EVERY == 0:
            self._tidy()
            self._look()
        return outcome

    def _outcome(self) -> Hashable:
        """Until a question of our own is answered: everything before it has been seen by then."""
        puppet = self._puppet
        mark = [-77, "no such operation", {}]
        answers: list[Hashable] = []
        try:
            channel.send(puppet.channel, channel.pack(mark))
            while True:
                received = channel.receive(puppet.channel)
                if received is None:
                    break
                (ident, error, result), fds = received
                channel.close_all(fds)
                if ident == -77:
                    return tuple(answers)
                answers.append(_sketch(ident, error, result))
        except (BrokenPipeError, ConnectionResetError):
            pass
        self._next_agent()
        return "another agent"

    def _next_agent(self) -> None:
        """It has been ended for what it said: a supervisor that goes on starts the next one."""
        self._puppet.close()
        if self._supervised.process.poll() is not None:
            raise Broken(f"the supervisor ended: {self._supervised.logged()[-2000:]}")
        try:
            self._puppet = self._supervised.agent()
        except TimeoutError as error:
            raise Broken("no agent was started after one that was ended") from error

    def _tidy(self) -> None:
        """Takes back all that was given, so that what remains is what leaks."""
        puppet = self._puppet
        for kind, operation, word in (
            ("calls", "cancel", "call"),
            ("calls", "forget_call", "call"),
            ("exits", "forget_process", "process"),
        ):
            while page := puppet.ask("list", {"kind": kind}):
                for key, _ in page:
                    _asked(puppet, operation, {word: key})
                if operation == "cancel":
                    break
        while names := puppet.ask("list", {"kind": "names"}):
            puppet.ask("release", {"names": names})

    def _look(self) -> None:
        supervised = self._supervised
        if "Traceback" in (said := supervised.logged()):
            raise Broken(f"a traceback: {said[said.index('Traceback') :][:2000]}")
        supervised.log.write_bytes(b"") if len(said) > 1 << 20 else None
        if (now := supervised.descriptors()) > self._fds + MAX_FDS:
            raise Broken(f"{now} descriptors, {self._fds} at first")
        if (kib := self._memory()) > self._kib + GROWTH_KIB:
            raise Broken(f"{kib} KiB, {self._kib} at first")
        if len(children(supervised.process.pid)) > 50:
            raise Broken("children that are not reaped")

    def _memory(self) -> int:
        lines = Path(f"/proc/{self._supervised.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def _asked(puppet: Puppet, operation: str, arguments: dict[str, Any]) -> None:
    with contextlib.suppress(Refused):
        puppet.ask(operation, arguments)


def _ends(packet: bytes) -> bool:
    try:
        message = msgpack.unpackb(packet, raw=False)
    except (ValueError, TypeError):
        return False
    return isinstance(message, list) and len(message) == 3 and message[1] in ENDS


def _sketch(ident: Any, error: Any, result: Any) -> Hashable:
    if isinstance(error, dict):
        return (
            ident is None,
            error.get("errno"),
            "".join(c for c in str(error.get("message"))[:60] if not c.isdigit()),
        )
    return ident is None, type(result).__name__, str(error)[:20]
