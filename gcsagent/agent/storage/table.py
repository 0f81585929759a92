"""The mounts there are, each with a file of its own in the state directory.

    <state>/empty/                    nothing: the lowest layer of an overlay that has but one
    <state>/storage/<number>.json     what was asked for, who holds it, and how far it has come

Numbers only grow: their order is the order of mounting, and unmounting goes the other way. A file is
written before anything is done that has to be undone, so that an agent which finds one knows what to look
for (:mod:`gcsagent.agent.storage.recovery`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import time
from collections.abc import Iterator
from typing import Any

from gcsagent.agent.journal import RequestMark
from gcsagent.agent.proc import boot_id
from gcsagent.agent.process_dir import VERSION, read_json, write_json
from protocol.dataclass import dataclass, field, replace
from protocol.errors import Code, RpcError
from protocol.families.storage import MountKind, MountState, MountStatus, MountStorage
from protocol.limits import MAX_MOUNTS
from protocol.schema import SchemaError, from_wire, to_wire

_log = logging.getLogger("agent.storage")


@dataclass(slots=True, eq=False)
class Entry:
    """One mount. ``changing`` is held by whoever mounts or unmounts it."""

    number: int
    asked: MountStorage
    """As its first holder did, with the target filled in; no target for swap."""
    holders: list[str]
    status: MountStatus = MountStatus.MOUNTING
    source: str = ""
    device: str = ""
    """The node its file system is on: a disk's, or the one dm-verity makes of it."""
    fstype: str = ""
    read_only: bool = False
    mount_id: int = 0
    what: list[str] = field(default_factory=list)
    """What the mount of that number has to be (:meth:`Mounted.what`), or it is another's that has the number
    now."""
    leaves: str = ""
    """Where it was when it was to be unmounted: elsewhere its number is another's."""
    before: list[int] = field(default_factory=list)
    """Mounts that were there on the same directory: what else is there is ours."""
    made: list[str] = field(default_factory=list)
    """Directories made for it."""
    formatting: str = ""
    """A device that was empty and is being formatted: half a file system on it is wiped off again."""
    formatted: bool = False
    frozen_until_ns: int = 0
    """By the clock that goes on while the guest is suspended."""
    leaving: RequestMark | None = None
    """The unmount that is under way."""
    dropped: RequestMark | None = None
    """The last unmount that another holder has outlived."""
    disk: int = 0
    """The number of the device that is nobody else's while it is MOUNTING."""
    problem: str = ""
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def ident(self) -> str:
        return self.holders[0]

    @property
    def target(self) -> str:
        return self.asked.target or ""

    @property
    def mapping(self) -> str:
        """What its dm-verity device is called."""
        return f"gcs-{self.number}"

    @property
    def call(self) -> str:
        """The supervisor's name for the tool that is at work on it."""
        return f"storage/{self.number}"

    def paths(self) -> list[str]:
        """What has to stay where it is for this mount to be what it is."""
        asked = self.asked
        device = asked.device.path if asked.device is not None else None
        return [
            path for path in (self.target, asked.path, *asked.lower, asked.upper, asked.work, device) if path
        ]

    def state(self, ident: str = "") -> MountState:
        return MountState(
            mount=ident or self.ident,
            kind=self.asked.kind,
            status=self.status,
            target=self.target,
            source=self.source,
            fstype=self.fstype,
            read_only=self.read_only,
            formatted=self.formatted,
            holders=tuple(self.holders),
            frozen_ms=max(0, self.frozen_until_ns - boot_time_ns()) // 1_000_000,
            problem=self.problem,
        )

    def document(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "boot_id": boot_id(),
            "asked": to_wire(self.asked),
            "holders": self.holders,
            "status": self.status.value,
            "source": self.source,
            "device": self.device,
            "fstype": self.fstype,
            "read_only": self.read_only,
            "mount_id": self.mount_id,
            "what": self.what,
            "leaves": self.leaves,
            "before": self.before,
            "made": self.made,
            "formatting": self.formatting,
            "formatted": self.formatted,
            "frozen_until_ns": self.frozen_until_ns,
            "leaving": self.leaving,
            "dropped": self.dropped,
            "problem": self.problem,
        }


def boot_time_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def device_number(path: str) -> int:
    """Of the device that a node, or a link to one, stands for; 0 without one."""
    try:
        return os.stat(path).st_rdev
    except OSError:
        return 0


def same(left: MountStorage, right: MountStorage) -> bool:
    """Whether they ask for the same, whoever does and however long they would wait."""
    return replace(left, mount="x", wait_ms=0) == replace(right, mount="x", wait_ms=0)


class Table:
    def __init__(self, state: str) -> None:
        self._directory, self._empty = os.path.join(state, "storage"), os.path.join(state, "empty")
        self._entries: dict[int, Entry] = {}
        self._last = 0

    def __iter__(self) -> Iterator[Entry]:
        """In the order of mounting."""
        return iter(list(self._entries.values()))

    def held_as(self, ident: str) -> Entry | None:
        return next((entry for entry in self if ident in entry.holders), None)

    def get(self, ident: str) -> Entry:
        """Raises NOT_FOUND."""
        entry = self.held_as(ident)
        if entry is None:
            raise RpcError(Code.NOT_FOUND, f"there is no mount {ident}; storage.list shows those there are")
        return entry

    def in_the_place_of(self, asked: MountStorage) -> Entry | None:
        """What is at its target; for swap, what is the same."""
        for entry in self:
            if asked.kind is MountKind.SWAP:
                if same(entry.asked, asked):
                    return entry
            elif entry.target == asked.target:
                return entry
        return None

    def taker_of(self, disk: int, but: Entry) -> Entry | None:
        """Who may be formatting or swapping to this device, or wiping off it what had been begun."""
        for entry in self:
            taken = entry.disk if entry.status is MountStatus.MOUNTING else 0
            if entry is not but and disk in (taken, device_number(entry.formatting)):
                return entry
        return None

    def begin(self, asked: MountStorage) -> Entry:
        """Raises RESOURCE_EXHAUSTED, OSError."""
        if len(self._entries) >= MAX_MOUNTS:
            raise RpcError(Code.RESOURCE_EXHAUSTED, f"there are {MAX_MOUNTS} mounts already; unmount some")
        self._last += 1
        entry = Entry(self._last, asked, [asked.mount])
        self.save(entry)
        self._entries[entry.number] = entry
        return entry

    def empty_directory(self) -> str:
        """One in which nothing ever is. Raises OSError."""
        os.makedirs(self._empty, mode=0o700, exist_ok=True)
        return self._empty

    def save(self, entry: Entry) -> None:
        """Raises OSError."""
        os.makedirs(self._directory, mode=0o700, exist_ok=True)
        write_json(self._path(entry.number), entry.document())

    def note(self, entry: Entry) -> None:
        """Saves what is true whether or not it can be written; the next agent looks again."""
        try:
            self.save(entry)
        except OSError as error:
            _log.error("a mount cannot be written down", extra={"mount": entry.ident, "error": str(error)})

    def forget(self, entry: Entry) -> None:
        self._entries.pop(entry.number, None)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(entry.number))

    def load(self) -> None:
        """What an earlier agent had written down. A file that cannot be read is told of and kept."""
        try:
            names = os.listdir(self._directory)
        except FileNotFoundError:
            return
        for name in names:
            if name.endswith(".tmp"):
                os.unlink(os.path.join(self._directory, name))
        for number in sorted(int(name[:-5]) for name in names if re.fullmatch(r"[0-9]+\.json", name)):
            self._last = max(self._last, number)
            try:
                document = read_json(self._path(number))
                if document["boot_id"] != boot_id():
                    os.unlink(self._path(number))  # nothing outlives the kernel it was mounted by
                else:
                    self._entries[number] = _read(number, document)
            except (OSError, ValueError, KeyError, TypeError, SchemaError) as error:
                _log.error(
                    "a mount's file cannot be read and is left alone",
                    extra={"file": self._path(number), "error": str(error)},
                )

    def _path(self, number: int) -> str:
        return os.path.join(self._directory, f"{number:08}.json")


def _read(number: int, document: dict[str, Any]) -> Entry:
    if document["version"] > VERSION:
        raise ValueError(f"it has version {document['version']}; this agent knows {VERSION}")
    entry = Entry(number, from_wire(MountStorage, document["asked"]), list(map(str, document["holders"])))
    entry.status = MountStatus(document["status"])
    for name in ("source", "device", "fstype", "formatting", "problem"):
        setattr(entry, name, str(document[name]))
    entry.mount_id, entry.frozen_until_ns = int(document["mount_id"]), int(document["frozen_until_ns"])
    # An agent before this one may not have known of them.
    entry.what, entry.leaves = list(map(str, document.get("what", []))), str(document.get("leaves", ""))
    entry.before, entry.made = list(map(int, document["before"])), list(map(str, document["made"]))
    entry.formatted, entry.read_only = bool(document["formatted"]), bool(document["read_only"])
    entry.leaving, entry.dropped = _mark(document["leaving"]), _mark(document["dropped"])
    if not entry.holders:
        raise ValueError("nobody holds it")
    return entry


def _mark(document: Any) -> RequestMark | None:
    return None if document is None else RequestMark(str(document[0]), str(document[1]))
