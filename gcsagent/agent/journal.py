"""Which requests have been carried out: what makes a ``request_id`` safe to repeat, also across a restart.

While a request runs it is *pending*: the same one joins it. When it has succeeded its answer is a file in
``<state>/requests/``; when it failed it has changed nothing and is forgotten. Launches carry their
``request_id`` in their process document as well, so that one which was under way when the agent was killed
is found by the next agent and its repeat is answered from what became of it (:mod:`gcsagent.agent.reload`).
A signal leaves no such trace, nor does an interface that is removed: that this is about to be done is written
down where its answer will be.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
from typing import Any, NamedTuple

from gcsagent.agent.process_dir import read_json, write_json
from protocol.errors import RpcError
from protocol.schema import to_wire

MAX_STORED = 4096
"""Answers kept; half of them are dropped, oldest first, when there are more."""

UNDONE = object()
"""The answer of a request that an agent was killed over and that has been undone: nobody's to see."""

_log = logging.getLogger("agent.journal")


class RequestMark(NamedTuple):
    """A request as it is written down: the caller's id, and a digest of what was asked."""

    ident: str
    digest: str


class Entry:
    """``future`` gives the answer, or the RpcError that it was; ``begun``: see :meth:`Journal.begun`."""

    __slots__ = ("begun", "digest", "future", "recorded")

    def __init__(self, digest: str) -> None:
        self.digest = digest
        self.recorded = self.begun = False
        self.future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()


class Journal:
    def __init__(self, state: str) -> None:
        self._directory = os.path.join(state, "requests")
        os.makedirs(self._directory, mode=0o700, exist_ok=True)
        self._stored = len(os.listdir(self._directory))
        self._pending: dict[str, Entry] = {}

    def find(self, ident: str) -> Entry | None:
        """The request with this id: pending, answered, or begun by an agent that was killed over it."""
        entry = self._pending.get(ident)
        if entry is not None:
            return entry
        try:
            document = read_json(self._path(ident))
            entry = Entry(str(document["digest"]))
            if document.get("begun"):
                entry.begun = True
                return entry
            error = document.get("error")
            entry.future.set_result(document["result"] if error is None else RpcError.from_wire(error))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError) as error:
            _log.error("a request's record is broken", extra={"request": ident, "error": str(error)})
            return None
        return entry

    def pending(self, ident: str) -> bool:
        return ident in self._pending

    def begin(self, mark: RequestMark) -> Entry:
        entry = self._pending[mark.ident] = Entry(mark.digest)
        return entry

    def finish(self, mark: RequestMark, result: Any) -> None:
        """Ends a pending request. A success is on disk before anybody hears of it."""
        entry = self._pending.pop(mark.ident, None)
        recorded = entry is not None and entry.recorded
        done = not isinstance(result, RpcError) and result is not UNDONE
        if done and not recorded:
            self._write(mark, result)
        elif entry is not None and entry.begun and not done:
            self._forget(mark)
        if entry is not None and not entry.future.done():
            entry.future.set_result(result)

    def record(self, mark: RequestMark | None, result: Any) -> None:
        """Writes an answer down ahead of its being given, where what follows removes all other trace.

        It may be an RpcError: of a request that failed, and has changed something nevertheless.
        """
        if mark is not None and self._write(mark, result) and (entry := self._pending.get(mark.ident)):
            entry.recorded = True

    def begun(self, mark: RequestMark | None) -> None:
        """Writes down that a request is about to do what cannot be seen afterwards."""
        entry = self._pending.get(mark.ident) if mark is not None else None
        if mark is not None and entry is not None:
            entry.begun = self._put(mark, {"begun": True})

    def answered(self, place: str) -> bool:
        """Whether there is an answer in that place."""
        return os.path.exists(os.path.join(self._directory, f"{place}.json"))

    def _write(self, mark: RequestMark, result: Any) -> bool:
        told = {"error": result.to_wire()} if isinstance(result, RpcError) else {"result": to_wire(result)}
        return self._put(mark, told)

    def _put(self, mark: RequestMark, told: dict[str, Any]) -> bool:
        try:
            write_json(self._path(mark.ident), {"request": mark.ident, "digest": mark.digest, **told})
        except OSError as error:
            _log.error("an answer cannot be kept", extra={"request": mark.ident, "error": str(error)})
            return False
        self._stored += 1
        if self._stored > MAX_STORED:
            self._trim()
        return True

    def _forget(self, mark: RequestMark) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self._path(mark.ident))

    def _trim(self) -> None:
        with os.scandir(self._directory) as entries:
            oldest = sorted((entry.stat().st_mtime_ns, entry.path) for entry in entries)
        for _, path in oldest[: max(0, len(oldest) - MAX_STORED // 2)]:
            os.unlink(path)
        self._stored = min(len(oldest), MAX_STORED // 2)

    def _path(self, ident: str) -> str:
        return os.path.join(self._directory, f"{place_of(ident)}.json")


def place_of(ident: str) -> str:
    """What the answer to a request is kept under, for its caller's id for it."""
    return hashlib.sha256(ident.encode()).hexdigest()[:40]
