"""The agent's log and the supervisor's in one ring with one numbering, which a restart does not interrupt.

The agent's lines are put in as they are logged. The supervisor keeps its own last ones in memory, numbered,
and pokes the agent when there is another; they are copied from there, each once: the ring's mark is the
number of the last one copied.
"""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Mapping
from typing import Any

from gcsagent.agent.logs import extra_fields
from gcsagent.agent.ring import Ring
from gcsagent.agent.supervisor_client import SupervisorClient, SupervisorError

SIZE = 512 << 10
"""Bytes: 2,000 lines or more; the newer half is there at any time."""

MAX_FIELDS, MAX_VALUE, MAX_MESSAGE, MAX_TRACE = 32, 1024, 4096, 16_384
_SMALL = 1 << 53

AGENT, SUPERVISOR = "agent", "supervisor"


class LogRing(logging.Handler):
    def __init__(self, fd: int | None, generation: int, size: int = SIZE) -> None:
        super().__init__()
        self.ring, self._generation = Ring("gcs-log", fd, size), generation
        self._loop = asyncio.get_running_loop()
        self._followers: set[asyncio.Event] = set()
        self._pulling: asyncio.Task[None] | None = None
        self._again = False
        newest = self.ring.get(self.ring.last) if self.ring.first <= self.ring.last else {}
        # Killed between the copy and its mark.
        self.ring.mark = max(self.ring.mark, int(newest.get("number", 0)))

    def emit(self, record: logging.LogRecord) -> None:
        """Whatever is wrong with the record: nobody who logs is to suffer from it."""
        try:
            fields = extra_fields(record)
            if record.exc_info:
                fields["exc_info"] = "".join(traceback.format_exception(*record.exc_info))[-MAX_TRACE:]
            self._add(
                round(record.created * 1e9),
                record.levelname.lower(),
                AGENT,
                record.name,
                record.getMessage(),
                fields,
            )
        except Exception:
            self.handleError(record)

    def follow(self, supervisor: SupervisorClient) -> None:
        """Copies what the supervisor logs, from where the last agent stopped."""

        def poke(_data: object) -> None:
            self._again = True
            if self._pulling is None or self._pulling.done():
                self._pulling = self._loop.create_task(self._pull(supervisor))

        supervisor.topics["log"] = poke
        poke(None)

    async def wait(self, after: int) -> None:
        """Until there is an entry numbered above ``after``."""
        event = asyncio.Event()
        self._followers.add(event)
        try:
            while self.ring.last <= after:
                event.clear()
                await event.wait()
        finally:
            self._followers.discard(event)

    async def _pull(self, supervisor: SupervisorClient) -> None:
        while self._again:
            self._again = False
            try:
                while lines := await supervisor.call("log", {"after": self.ring.mark}):
                    for line in lines:
                        self._copy(line)
            except SupervisorError:
                return  # an earlier version's, whose lines are on the console only

    def _copy(self, line: dict[str, Any]) -> None:
        number = int(line.pop("number"))
        if number > self.ring.mark:
            when, level, message = int(line.pop("time_ns")), str(line.pop("level")), str(line.pop("message"))
            name = str(line.pop("name", SUPERVISOR))
            self.acquire()
            try:
                if number > self.ring.mark + 1:
                    lost = {"lines": number - self.ring.mark - 1}
                    self._add(when, "warning", SUPERVISOR, SUPERVISOR, "lines of the log were lost", lost)
                self._add(when, level, SUPERVISOR, name, message, line, number)
                self.ring.mark = number
            finally:
                self.release()

    def _add(
        self,
        when: int,
        level: str,
        source: str,
        name: str,
        message: str,
        fields: Mapping[str, Any],
        number: int = 0,
    ) -> None:
        entry: dict[str, Any] = {
            "seq": self.ring.last + 1,
            "time_ns": when,
            "level": level,
            "source": source,
            "name": name,
            "message": _text(message, MAX_MESSAGE),
            "fields": {_text(key, 64): _plain(fields[key], key) for key in list(fields)[:MAX_FIELDS]},
            "generation": self._generation,
        }
        self.ring.append({**entry, "number": number} if number else entry)
        if self._followers:
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        for event in self._followers:
            event.set()


def _plain(value: Any, key: str) -> Any:
    if value is None or isinstance(value, bool) or (isinstance(value, int) and abs(value) < _SMALL):
        return value
    if isinstance(value, float):
        return value
    return _text(value, MAX_TRACE if key == "exc_info" else MAX_VALUE)


def _text(value: object, limit: int) -> str:
    text = str(value)
    text = text if len(text) <= limit else text[:limit] + "…"
    return text.encode("utf-8", "replace").decode()
