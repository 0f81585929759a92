"""Checkpoints on disk.

    <state>/checkpoints/<checkpoint>/     or a link to the directory that was asked for
        checkpoint.json    what it is; a directory without it is no checkpoint
        deleting.json      while it is deleted: on whose request
        config.json        the spec the runtime had
        images/            CRIU's, and the runtime's descriptors.json
        streams/<stream>   bytes of an output that nobody had taken
        upper.tar          with an overlay: its upper layer
    .new-<name>            beside where it is to be: one that is being made

A checkpoint is made under its temporary name and renamed when it is whole.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

from gcsagent.agent import criu
from gcsagent.agent.calls import Caller
from gcsagent.agent.journal import Journal, RequestMark
from gcsagent.agent.process_dir import VERSION, read_json, write_json
from protocol.dataclass import dataclass
from protocol.errors import Code, RpcError
from protocol.families.checkpoint import Checkpoint
from protocol.method import Empty
from protocol.schema import SchemaError, from_wire, to_wire
from protocol.types import Stdio

_log = logging.getLogger("agent.checkpoints")

REMOVE_SECONDS = 60.0
_BROKEN = (OSError, ValueError, KeyError, TypeError, SchemaError)


@dataclass(frozen=True, slots=True)
class Saved:
    """What checkpoint.json says beside what the contract shows: what a restore needs."""

    args: tuple[str, ...]
    stdio: Stdio
    labels: dict[str, str]
    auto_delete: bool
    owns_pids: bool
    cgroup: str
    """Below the agent's own."""
    lower: str
    """The overlay's lower directory; empty without one."""
    limits: dict[str, str]
    """The files of :mod:`gcsagent.agent.limit_files` as they were."""
    io_limits: dict[str, dict[str, int]]
    streams: dict[str, dict[str, Any]]
    """:data:`gcsagent.agent.stream_images.Images`."""


class CheckpointDir:
    """One checkpoint's directory, under whichever name."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.images = os.path.join(path, "images")
        self.streams = os.path.join(path, "streams")
        self.upper = os.path.join(path, "upper.tar")

    def create(self) -> None:
        """Raises OSError."""
        os.mkdir(self.path, mode=0o700)
        os.mkdir(self.images, mode=0o700)
        os.mkdir(self.streams, mode=0o700)

    @property
    def whole(self) -> bool:
        return os.path.exists(os.path.join(self.path, "checkpoint.json"))

    def write(self, about: Checkpoint, saved: Saved) -> None:
        document = {"version": VERSION, "about": to_wire(about), "saved": to_wire(saved)}
        write_json(os.path.join(self.path, "checkpoint.json"), document)

    def read(self) -> tuple[Checkpoint, Saved]:
        """Raises NOT_FOUND, or FAILED_PRECONDITION for one that cannot be read."""
        try:
            document = read_json(os.path.join(self.path, "checkpoint.json"))
            if document["version"] > VERSION:
                raise ValueError(f"version {document['version']} is a newer agent's")
            return from_wire(Checkpoint, document["about"]), from_wire(Saved, document["saved"])
        except (FileNotFoundError, NotADirectoryError) as error:
            raise RpcError(Code.NOT_FOUND, f"{self.path} holds no checkpoint") from error
        except _BROKEN as error:
            raise RpcError(
                Code.FAILED_PRECONDITION, f"{self.path}/checkpoint.json cannot be read: {error}"
            ) from error

    def spec(self) -> dict[str, Any]:
        """Raises OSError or ValueError."""
        return read_json(os.path.join(self.path, "config.json"))

    def size(self) -> int:
        return sum(
            os.lstat(os.path.join(parent, name)).st_size
            for parent, _, names in os.walk(self.path)
            for name in names
        )


class CheckpointStore:
    """The directory is made with the first checkpoint."""

    def __init__(self, state: str) -> None:
        self._directory = os.path.join(state, "checkpoints")
        self._going: set[str] = set()

    def named(self, ident: str) -> CheckpointDir:
        return CheckpointDir(os.path.join(self._directory, ident))

    def find(self, ident: str, *, remains: bool = False) -> CheckpointDir:
        """Also what a deletion that failed has left, with ``remains``. Raises NOT_FOUND."""
        found = self.named(ident)
        left = remains and ident not in self._going and os.path.lexists(found.path)
        if not found.whole and not left:
            raise RpcError(Code.NOT_FOUND, f"there is no checkpoint {ident}")
        return found

    def plan(self, ident: str, path: str | None) -> dict[str, str]:
        """Where a new one goes: ``temporary``, ``final`` and, elsewhere than here, the ``link`` to it.

        Raises ALREADY_EXISTS, NOT_FOUND or INVALID_ARGUMENT.
        """
        os.makedirs(self._directory, mode=0o700, exist_ok=True)
        here = os.path.join(self._directory, ident)
        if os.path.lexists(here):
            raise RpcError(Code.ALREADY_EXISTS, f"there is a checkpoint {ident} already")
        if path is None:
            return {"temporary": os.path.join(self._directory, f".new-{ident}"), "final": here, "link": ""}
        final = os.path.normpath(path)
        parent, name = os.path.split(final)
        if os.path.lexists(final):
            raise RpcError(Code.ALREADY_EXISTS, f"path: {final} is there already", field="path")
        if not name or not os.path.isdir(parent):
            raise RpcError(Code.NOT_FOUND, f"path: {parent} is not a directory in the guest", field="path")
        return {"temporary": os.path.join(parent, f".new-{name}"), "final": final, "link": here}

    def publish(self, plan: dict[str, Any]) -> None:
        """The checkpoint gets its name. Done again after an agent was killed here, it goes on."""
        if os.path.isdir(plan["temporary"]):
            os.rename(plan["temporary"], plan["final"])
        if plan["link"] and not os.path.islink(plan["link"]):
            os.symlink(plan["final"], plan["link"])

    async def discard(self, caller: Caller, plan: dict[str, Any]) -> None:
        """What was begun of one that came to nothing. Raises RpcError."""
        if os.path.lexists(plan["temporary"]):
            await criu.run(caller, ["rm", "-rf", "--", plan["temporary"]], REMOVE_SECONDS)

    def all(self) -> list[Checkpoint]:
        found = []
        for entry in self._entries():
            try:
                found.append(entry.read()[0])
            except RpcError as error:
                _log.warning("a checkpoint cannot be read", extra={"error": str(error)})
        return sorted(found, key=lambda checkpoint: checkpoint.created_at_ns)

    async def delete(self, caller: Caller, journal: Journal, ident: str, mark: RequestMark | None) -> None:
        """Without its document it is no checkpoint any more; ``mark`` is the request's. Raises RpcError."""
        found = self.named(ident)
        if found.whole:
            write_json(os.path.join(found.path, "deleting.json"), {"request": mark})
            os.unlink(os.path.join(found.path, "checkpoint.json"))
        journal.record(mark, Empty())
        await self._remove(caller, ident)

    async def _remove(self, caller: Caller, ident: str) -> None:
        """Somebody may have put something else where a link leads to: that stays. Raises RpcError."""
        path = self.named(ident).path
        self._going.add(ident)
        try:
            if not os.path.islink(path) or os.path.exists(os.path.join(path, "deleting.json")):
                await criu.run(caller, ["rm", "-rf", "--", os.path.realpath(path)], REMOVE_SECONDS)
            if os.path.islink(path):
                os.unlink(path)
        finally:
            self._going.discard(ident)

    def deletions(self) -> list[RequestMark]:
        """The requests of deletions that have begun and are not through."""
        found = []
        for name in self._names():
            entry = self.named(name)
            with contextlib.suppress(*_BROKEN):
                if not entry.whole:
                    ident, digest = read_json(os.path.join(entry.path, "deleting.json"))["request"]
                    found.append(RequestMark(ident, digest))
        return found

    async def sweep(self, caller: Caller, under_way: set[str]) -> None:
        """Removes what a killed agent left half made or half deleted, beside those ``under_way``."""
        for name in self._names():
            path = os.path.join(self._directory, name)
            if path in under_way or CheckpointDir(path).whole:
                continue
            _log.warning("what is no whole checkpoint is removed", extra={"fields": {"path": path}})
            await self._remove(caller, name)

    def _names(self) -> list[str]:
        try:
            return os.listdir(self._directory)
        except FileNotFoundError:
            return []

    def _entries(self) -> Iterator[CheckpointDir]:
        for name in self._names():
            if not name.startswith(".") and self.named(name).whole:
                yield self.named(name)
