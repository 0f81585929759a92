"""Which requests have been carried out: what makes a ``request_id`` safe to repeat, also across a restart.

While a request runs it is *pending*: the same one joins it. When it has succeeded its answer is a file in
``<state>/requests/``; when it failed it has changed nothing and is forgotten. Launches carry their
``request_id`` in their process document as well, so that one which was under way when the agent was killed
is found by the next agent and its repeat is answered from what became of it (:mod:`gcsagent.agent.reload`).
"""

from __future__ import annotations

import asyncio
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
    """``future`` gives the answer, or the RpcError that it was."""

    __slots__ = ("digest", "future", "recorded")

    def __init__(self, digest: str) -> None:
        self.digest = digest
        self.recorded = False
        self.future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()


class Journal:
    def __init__(self, state: str) -> None:
        self._directory = os.path.join(state, "requests")
        os.makedirs(self._directory, mode=0o700, exist_ok=True)
        self._stored = len(os.listdir(self._directory))
        self._pending: dict[str, Entry] = {}

    def find(self, ident: str) -> Entry | None:
        """The request with this id, pending or answered."""
        entry = self._pending.get(ident)
        if entry is not None:
            return entry
        try:
            document = read_json(self._path(ident))
            entry = Entry(str(document["digest"]))
            error = document.get("error")
            entry.future.set_result(document["result"] if error is None else RpcError.from_wire(error))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError) as error:
            _log.error("a request's record is broken", extra={"request": ident, "error": str(error)})
            return None
        return entry

    def begin(self, mark: RequestMark) -> Entry:
        entry = self._pending[mark.ident] = Entry(mark.digest)
        return entry

    def finish(self, mark: RequestMark, result: Any) -> None:
        """Ends a pending request. A success is on disk before anybody hears of it."""
        entry = self._pending.pop(mark.ident, None)
        recorded = entry is not None and entry.recorded
        if not recorded and not isinstance(result, RpcError) and result is not UNDONE:
            self._write(mark, result)
        if entry is not None and not entry.future.done():
            entry.future.set_result(result)

    def record(self, mark: RequestMark | None, result: Any) -> None:
        """Writes an answer down ahead of its being given, where what follows removes all other trace.

        It may be an RpcError: of a request that failed, and has changed something nevertheless.
        """
        if mark is not None and self._write(mark, result) and (entry := self._pending.get(mark.ident)):
            entry.recorded = True

    def answered(self, place: str) -> bool:
        """Whether there is an answer in that place."""
        return os.path.exists(os.path.join(self._directory, f"{place}.json"))

    def _write(self, mark: RequestMark, result: Any) -> bool:
        document: dict[str, Any] = {"request": mark.ident, "digest": mark.digest}
        if isinstance(result, RpcError):
            document["error"] = result.to_wire()
        else:
            document["result"] = to_wire(result)
        try:
            write_json(self._path(mark.ident), document)
        except OSError as error:
            _log.error("an answer cannot be kept", extra={"request": mark.ident, "error": str(error)})
            return False
        self._stored += 1
        if self._stored > MAX_STORED:
            self._trim()
        return True

    def _trim(self) -> None:
        with os.scandir(self._directory) as entries:
            oldest = sorted((entry.stat().st_mtime_ns, entry.path) for entry in entries)
        for _, path in oldest[: len(oldest) - MAX_STORED // 2]:
            os.unlink(path)
        self._stored = min(len(oldest), MAX_STORED // 2)

    def _path(self, ident: str) -> str:
        return os.path.join(self._directory, f"{place_of(ident)}.json")


def place_of(ident: str) -> str:
    """What the answer to a request is kept under, for its caller's id for it."""
    return hashlib.sha256(ident.encode()).hexdigest()[:40]
