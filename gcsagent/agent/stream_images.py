"""What a checkpoint keeps of init's streams, and how the streams of a restored init begin.

CRIU neither saves nor restores what a pipe to the outside holds: the restored init gets new pipes in the
place of the old ones. Offsets go on where they were, so that a client of the old stream and one of the new
have, together, every byte once:

* stdin: what the process had read is counted; what it had not, CRIU has in its pipes-data.img, saved in the
  same instant as the process, and it goes into the new pipe.
* stdout, stderr in mode ``stream``: what a client is attached to take, or will be since the container runs
  on, stays with the old stream, and the new one begins behind it. What nobody was there to take is moved
  to the checkpoint, and from there into the new pipe.
* in mode ``spool``: a container that has ended leaves what its spool keeps to the new one as well, at the
  same offsets: a spool can be read again.
* a TTY's output stays with the old terminal. Input that was typed and not read is lost: CRIU
  does not save it.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import re
import time
from typing import Any

from gcsagent.agent import criu
from gcsagent.agent.attachable import Keeper
from gcsagent.agent.checkpoints_dir import CheckpointDir
from gcsagent.agent.process import Process
from gcsagent.agent.spool_stream import SpoolStream
from gcsagent.agent.stdio import PreparedStdio
from gcsagent.agent.streams import InputStream, OutputStream
from gcsagent.agent.terminal import DiscardedTty, TtyStream
from protocol.errors import Code, RpcError

Images = dict[str, dict[str, Any]]
"""By stream name: ``offset`` it begins at, ``kept`` bytes from there on in the checkpoint; for stdin how
much was ``read`` and whether it ``ended``; for a TTY the ``input`` it took and its ``size``."""

_CHUNK = 1 << 20
_PIPE = re.compile(r"pipe:\[([0-9]+)\]")


def before(process: Process) -> dict[str, Any]:
    """What can be known only while the container is frozen and has not been saved yet."""
    known: dict[str, Any] = {}
    stdin, tty = process.streams.get("stdin"), _tty(process)
    if isinstance(stdin, InputStream):
        known["stdin"] = {"read": stdin.consumed(), "ended": stdin.ended, "close_at": stdin.closing_at()}
    if tty is not None:
        known["tty"] = {"size": tty.size(), "input": tty.taken()}
    return known


async def save(process: Process, directory: CheckpointDir, known: dict[str, Any], alive: bool) -> Images:
    """The images of init's streams, spools' bytes copied; :func:`take` is to follow without a wait."""
    images: Images = {name: dict(about) for name, about in known.items()}
    if "stdin" in images:
        unread = criu.pipe_data(directory.images, _stdin_inode(directory))
        images["stdin"]["offset"] = images["stdin"]["read"] + len(unread)
    for name, stream in process.streams.items():
        if isinstance(stream, SpoolStream) and not alive:
            images[name] = await _copy_spool(stream, os.path.join(directory.streams, name))
    for name, stream in process.streams.items():
        if isinstance(stream, SpoolStream) and alive:
            images[name] = {"offset": stream.produced(), "kept": 0}
        elif isinstance(stream, OutputStream):
            moves = not alive and not stream.attached
            count = stream.waiting() if moves else 0
            images[name] = {"offset": stream.produced() - count, "kept": count}
    tty = _tty(process)
    if tty is not None:
        images["tty"]["offset"] = tty.state().bytes + tty.waiting()
    return images


def take(process: Process, directory: CheckpointDir, images: Images) -> None:
    """Moves what nobody was there to take. Done again after an agent was killed here, it goes on."""
    for name, image in images.items():
        stream = process.streams.get(name)
        if isinstance(stream, OutputStream) and image["kept"] and not stream.attached:
            path = os.path.join(directory.streams, name)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.lseek(fd, 0, os.SEEK_END)
                stream.move_rest(fd)
            finally:
                os.close(fd)


def offsets(images: Images) -> dict[str, int]:
    return {name: int(image["offset"]) for name, image in images.items()}


def begin(prepared: PreparedStdio, keeper: Keeper, source: CheckpointDir, images: Images) -> None:
    """Sets new streams to go on from ``images``. Raises RpcError, OSError or ValueError."""
    for name, image in images.items():
        stream = prepared.streams.get(name)
        kept = os.path.join(source.streams, name)
        if isinstance(stream, InputStream):
            child = prepared.child[0]
            assert child is not None
            unread = criu.pipe_data(source.images, _stdin_inode(source))
            _fill(prepared.hold[_held_name(prepared, "stdin")], unread)
            count = image["offset"]
            stream.begin_at(count)
            if image["ended"] or image["close_at"] is not None:
                stream.end_at(count if image["ended"] else image["close_at"])
        elif isinstance(stream, SpoolStream):
            _fill_spool(stream, kept, image)
        elif isinstance(stream, OutputStream):
            stream.begin_at(image["offset"])
            child = prepared.child[1 if name == "stdout" else 2]
            assert child is not None
            if image["kept"]:
                with open(kept, "rb") as file:
                    _fill(child, file.read(image["kept"]))
        elif name == "tty":
            slots = prepared.slots["tty"] = [keeper.counters.allocate() for _ in range(2)]
            for slot, offset in zip(slots, (image["offset"], image["input"]), strict=True):
                keeper.counters.filling(slot, offset)


def _held_name(prepared: PreparedStdio, name: str) -> str:
    return next(full for full in prepared.hold if full.endswith(f"/{name}"))


def _tty(process: Process) -> TtyStream | None:
    stream = process.streams.get("tty")
    if isinstance(stream, DiscardedTty):
        return stream.tty
    return stream if isinstance(stream, TtyStream) else None


async def _copy_spool(stream: SpoolStream, path: str) -> dict[str, Any]:
    """All that the spool keeps. What is still in the pipe comes into it first, or waits there for room."""
    spool, begun = stream.spool, stream.spool.first
    at, reader = begun, spool.reader(begun)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        while True:
            stream.fill_now()
            if at == spool.written:
                break
            at += os.sendfile(fd, reader, None, min(_CHUNK, spool.written - at))
            await asyncio.sleep(0)
        end = at + stream.move_rest(fd)
    finally:
        os.close(reader)
        os.close(fd)
    first = max(spool.first, begun)
    return {"offset": first, "kept": end - first, "skip": first - begun}


def _fill_spool(stream: SpoolStream, path: str, image: dict[str, Any]) -> None:
    if not image["kept"]:
        stream.spool.begin_at(image["offset"], -1, 0)
        return
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.lseek(fd, image["skip"], os.SEEK_SET)
        stream.spool.begin_at(image["offset"], fd, image["kept"])
    finally:
        os.close(fd)
    stream.index.note(image["offset"], time.time_ns(), image["offset"])


def _fill(pipe: int, data: bytes) -> None:
    """Writes all of ``data`` into an empty pipe that nobody reads yet. Raises RESOURCE_EXHAUSTED."""
    if not data:
        return
    if len(data) > fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ):
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, len(data))
    if fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ) < len(data):
        raise RpcError(Code.RESOURCE_EXHAUSTED, f"a pipe of {len(data)} bytes cannot be had")
    os.write(pipe, data)


def _stdin_inode(source: CheckpointDir) -> int:
    """From descriptors.json, in which runc says what init's standard descriptors were."""
    with open(os.path.join(source.images, "descriptors.json"), encoding="utf-8") as file:
        match = _PIPE.match(str(json.load(file)[0]))
    return int(match[1]) if match else 0
