"""What an archiver does with its connection and its root directory."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from gcsagent.archiver.job import NOTE_FD, ROOT_FD, Job
from gcsagent.archiver.peer import Peer
from gcsagent.tarball import pack, places, unpack
from gcsagent.tarball.attributes import Keep, outside
from gcsagent.tarball.errors import ArchiveError
from gcsagent.tarball.source import Source
from gcsagent.tarball.tree import Tree, split
from protocol.errors import Code, RpcError
from protocol.families.archive import Archived, GetArchive, PutArchive
from protocol.schema import from_wire

CHUNK = 1 << 18
"""Bytes of an archive in one message."""


def carry_out(job: Job, peer: Peer) -> Archived:
    """Raises RpcError, and what the peer raises."""
    try:
        if job.method == "archive.put":
            return put(job, peer, from_wire(PutArchive, job.params))
        return get(job, peer, from_wire(GetArchive, job.params))
    except ArchiveError as error:
        details: dict[str, Any] = {"errno": error.errno} if error.errno else {}
        if error.field:
            details["field"] = error.field
        raise RpcError(error.code, error.message, **details) from error


def put(job: Job, peer: Peer, params: PutArchive) -> Archived:
    tree = Tree(ROOT_FD, owner=(outside(0, job.uids, "/"), outside(0, job.gids, "/")))
    place = _place(tree, params)
    rules = unpack.Rules(
        keep=Keep(uids=job.uids, gids=job.gids),
        name=params.copy or "",
        rename=place.name,
        special=params.special,
        max_entries=params.max_entries or unpack.MAX_ENTRIES,
        max_bytes=params.max_bytes,
    )
    digest = hashlib.sha256()

    def more() -> bytes:
        data = peer.next_data()
        digest.update(data)
        return data

    source = Source(more, most=params.max_bytes)
    peer.ready()
    tally = unpack.Unpacker(tree, place.parts, rules, note=write_note).run(source)
    end = peer.end
    assert end is not None  # the source has ended
    if end.bytes != source.received:
        raise RpcError(
            Code.INVALID_ARGUMENT,
            f"{source.received} bytes of the archive have come, not {end.bytes}",
            field="bytes",
        )
    if end.sha256 is not None and end.sha256 != digest.hexdigest():
        raise RpcError(
            Code.INVALID_ARGUMENT,
            f"what has come is not that archive: its SHA-256 is {digest.hexdigest()}",
            field="sha256",
        )
    return Archived(source.received, tally.entries, tally.skipped, digest.hexdigest() if end.sha256 else "")


def _place(tree: Tree, params: PutArchive) -> places.Place:
    if params.copy is None:
        return places.for_contents(tree, params.path, make=params.make)
    return places.for_copy(tree, params.path, params.copy, is_directory=params.directory)


def get(job: Job, peer: Peer, params: GetArchive) -> Archived:
    outbox = _Outbox(peer, params.digest)
    choice = pack.Choice(
        uids=job.uids,
        gids=job.gids,
        made_up=pack.made_up(Path(job.mountinfo).read_bytes().decode(errors="surrogateescape")),
        max_entries=params.max_entries or unpack.MAX_ENTRIES,
        max_bytes=params.max_bytes,
    )
    tally = pack.Packer(outbox.write, choice).run(Tree(ROOT_FD), params.path, follow=params.follow)
    outbox.flush()
    return Archived(outbox.sent, tally.entries, tally.skipped, outbox.hexdigest())


class _Outbox:
    """Makes messages of a good size out of headers and data."""

    def __init__(self, peer: Peer, digest: bool) -> None:
        self._peer = peer
        self._digest = hashlib.sha256() if digest else None
        self._waiting = bytearray()
        self.sent = 0

    def write(self, data: bytes | memoryview) -> None:
        self._waiting += data
        while len(self._waiting) >= CHUNK:
            self._send(bytes(self._waiting[:CHUNK]))
            del self._waiting[:CHUNK]

    def flush(self) -> None:
        if self._waiting:
            self._send(bytes(self._waiting))
            self._waiting.clear()

    def hexdigest(self) -> str:
        return "" if self._digest is None else self._digest.hexdigest()

    def _send(self, data: bytes) -> None:
        if self._digest is not None:
            self._digest.update(data)
        self._peer.listen()
        self._peer.send_data(data)
        self.sent += len(data)


def write_note(path: str) -> None:
    """The temporary name in use, for :func:`sweep` should this process be killed; "" is none."""
    if not path:
        os.ftruncate(NOTE_FD, 0)
        return
    text = json.dumps(path).encode()
    os.pwrite(NOTE_FD, text, 0)
    os.ftruncate(NOTE_FD, len(text))


def sweep() -> None:
    """Removes what a killed archiver has left under the temporary name it wrote down."""
    try:
        parts = split(json.loads(os.pread(NOTE_FD, 65536, 0)))
    except ValueError:
        return  # none, or killed as it was written: before it was used
    if not parts or not parts[-1].startswith(unpack.TEMPORARY):
        return
    try:
        directory = Tree(ROOT_FD).directory(parts[:-1])
        os.unlink(parts[-1], dir_fd=directory)
    except (OSError, ArchiveError):
        return  # there is none
