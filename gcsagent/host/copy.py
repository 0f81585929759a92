"""Copies files between this machine and a guest, by the rules of ``docker cp``.

What a guest sends is hostile until shown otherwise: it is unpacked below the one place that was asked for,
under the name that was asked for, through no symlink, without devices, set-id bits and other owners unless
those are wanted, and bounded. Packing and unpacking are a thread's, with a pipe between it and the loop.
"""

from __future__ import annotations

import asyncio
import os
import stat
import tarfile
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from gcsagent.host.archive import get_archive, put_archive
from gcsagent.host.client import Client
from gcsagent.host.errors import HostError
from gcsagent.host.localio import LocalReader, LocalWriter
from gcsagent.tarball import pack, places, unpack
from gcsagent.tarball.attributes import Keep
from gcsagent.tarball.errors import ArchiveError
from gcsagent.tarball.source import Source
from gcsagent.tarball.tree import Tree
from protocol.families.archive import Archived, GetArchive, PutArchive

CHUNK = 1 << 18
MAX_BYTES = 64 << 30
"""What a guest may send, if nothing else is said."""

T = TypeVar("T")
Progress = Callable[[int], None]


class CannotCopy(HostError):
    """Something on this side is in the way, or wrong with what the guest sent."""


@dataclass(frozen=True, slots=True)
class Manner:
    """``archive``: owners, set-id bits, extended attributes and devices, too. ``follow``: if the source is a
    symlink, what it leads to. ``max_bytes`` and ``max_entries`` bound what comes from a guest."""

    archive: bool = False
    follow: bool = False
    max_bytes: int = MAX_BYTES
    max_entries: int = unpack.MAX_ENTRIES
    progress: Progress = field(default=lambda _bytes: None)


# -- to the guest ---------------------------------------------------------------------------------


async def upload(client: Client, source: str, container: str | None, path: str, manner: Manner) -> Archived:
    """Copies the file or directory ``source`` to ``path`` in the container, or in the guest for None.

    Raises CannotCopy, and what :func:`gcsagent.host.archive.put_archive` raises.
    """
    params, name = _announce(source, container, path, manner)
    return await put_archive(client, params, _packed(source, name, manner))


async def upload_archive(
    client: Client, source: AsyncIterator[bytes], container: str | None, path: str, manner: Manner
) -> Archived:
    """Unpacks the tar archive ``source`` in the directory ``path``."""
    params = PutArchive(container, path, special=manner.archive)
    return await put_archive(client, params, _counted(source, manner.progress))


def _announce(source: str, container: str | None, path: str, manner: Manner) -> tuple[PutArchive, str]:
    """The request, and what the archive's top-level entry is called."""
    inward = source.endswith(("/", "/.")) or source == "."
    try:
        info = os.stat(source) if manner.follow or inward else os.lstat(source)
    except OSError as error:
        raise CannotCopy(f"{source}: {error.strerror}") from error
    is_directory = stat.S_ISDIR(info.st_mode)
    if source.endswith(("/", "/.")) and not is_directory:
        raise CannotCopy(f"{source}: is no directory")
    name = os.path.basename(source.rstrip("/"))
    if is_directory and name in ("", ".", ".."):
        return PutArchive(container, path, make=True, special=manner.archive), "."
    if stat.S_ISSOCK(info.st_mode):
        raise CannotCopy(f"{source}: is a socket, which cannot be copied")
    return (
        PutArchive(container, path, copy=name, directory=is_directory, special=manner.archive),
        name,
    )


async def _packed(source: str, name: str, manner: Manner) -> AsyncIterator[bytes]:
    reading, writing = os.pipe2(os.O_CLOEXEC)
    packing = asyncio.create_task(asyncio.to_thread(_pack, source, name, manner, writing))
    try:
        reader = LocalReader(reading)
        while data := await reader.read(CHUNK):
            manner.progress(len(data))
            yield data
        await _outcome(packing)
    finally:
        os.close(reading)  # the thread writes no more
        await asyncio.gather(packing, return_exceptions=True)


def _pack(source: str, name: str, manner: Manner, writing: int) -> None:
    """In a thread; uses ``writing`` up."""
    choice = pack.Choice(
        owner=None if manner.archive else (0, 0),
        special=manner.archive,
        xattrs=manner.archive,
        made_up=_made_up(),
    )
    root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with open(writing, "wb", buffering=CHUNK) as out:
            packer = pack.Packer(lambda data: _nothing(out.write(data)), choice)
            # Not normalised: behind a symlink, ".." is somewhere else.
            packer.run(Tree(root), os.path.join(os.getcwd(), source), follow=manner.follow, name=name)
    finally:
        os.close(root)


def _made_up() -> frozenset[int]:
    with open("/proc/self/mountinfo", errors="surrogateescape", newline="\n") as file:
        return pack.made_up(file.read())


def _nothing(_value: object) -> None:
    return None


async def _counted(source: AsyncIterator[bytes], progress: Progress) -> AsyncIterator[bytes]:
    async for data in source:
        progress(len(data))
        yield data


# -- from the guest -------------------------------------------------------------------------------


async def download(
    client: Client, container: str | None, path: str, target: str, manner: Manner
) -> tuple[Archived, unpack.Tally]:
    """Copies ``path`` to ``target`` here; the tally is of what has been unpacked.

    Raises CannotCopy, and what :func:`gcsagent.host.archive.get_archive` raises.
    """
    name = os.path.basename(path.rstrip("/"))
    if name == "..":
        raise CannotCopy(f"{path}: give the directory's own name, not '..'")
    reading, writing = os.pipe2(os.O_CLOEXEC)
    unpacking = asyncio.create_task(
        asyncio.to_thread(_unpack, reading, "" if name == "." else name, target, manner)
    )
    out = LocalWriter(writing)
    try:
        result = await get_archive(client, _wanted(container, path, manner), _Sink(out, unpacking, manner))
    except BaseException:
        out.close()
        os.close(writing)  # the thread finds its archive cut off
        await asyncio.gather(unpacking, return_exceptions=True)
        raise
    out.close()
    os.close(writing)
    return result, await _outcome(unpacking)


async def download_archive(
    client: Client,
    container: str | None,
    path: str,
    write: Callable[[bytes], Awaitable[None]],
    manner: Manner,
) -> Archived:
    """Gives ``write`` the tar archive of ``path``."""

    async def sink(data: bytes) -> None:
        manner.progress(len(data))
        await write(data)

    return await get_archive(client, _wanted(container, path, manner), sink)


def _wanted(container: str | None, path: str, manner: Manner) -> GetArchive:
    return GetArchive(path, container, follow=manner.follow, max_entries=manner.max_entries)


class _Sink:
    """Into the pipe; what the other end failed with, if it did."""

    def __init__(self, out: LocalWriter, unpacking: asyncio.Task[unpack.Tally], manner: Manner) -> None:
        self._out, self._unpacking, self._progress = out, unpacking, manner.progress

    async def __call__(self, data: bytes) -> None:
        self._progress(len(data))
        try:
            await self._out.write(data)
        except BrokenPipeError:
            await _outcome(self._unpacking)
            raise


async def _outcome(work: asyncio.Task[T]) -> T:
    try:
        return await work
    except ArchiveError as error:
        raise CannotCopy(error.message) from error


def _unpack(reading: int, name: str, target: str, manner: Manner) -> unpack.Tally:
    """In a thread; uses ``reading`` up. Raises ArchiveError."""
    root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    below = Below(root, name, os.path.join(os.getcwd(), target))
    try:
        with open(reading, "rb", buffering=0) as file:
            unpacker = unpack.Unpacker(Tree(root), [], _rules(manner, name), first=below.settle)
            return unpacker.run(Source(lambda: file.read(CHUNK), most=manner.max_bytes))
    finally:
        below.close()


def _rules(manner: Manner, name: str) -> unpack.Rules:
    privileged = manner.archive and os.geteuid() == 0
    return unpack.Rules(
        keep=Keep(
            owner=privileged,
            setid=manner.archive,
            xattrs=Keep().xattrs if privileged else ("user.",) if manner.archive else (),
        ),
        name=name,
        special=privileged,
        pass_over=True,
        max_entries=manner.max_entries,
        max_bytes=manner.max_bytes,
    )


class Below:
    """The directory that a copy goes into, known when its first entry is: a file's place is not a
    directory's. From there on nothing is looked up that is not below it, and no symlink is followed."""

    def __init__(self, root: int, name: str, target: str) -> None:
        """Takes ``root``, the descriptor of ``/``, over. ``name`` "": the contents of a directory come."""
        self._fds, self._name, self._target = [root], name, target

    def settle(self, unpacker: unpack.Unpacker, member: tarfile.TarInfo) -> None:
        """Raises ArchiveError."""
        everywhere = Tree(self._fds[0])
        if self._name:
            place = places.for_copy(everywhere, self._target, self._name, is_directory=member.isdir())
        else:
            place = places.for_contents(everywhere, self._target, make=True)
        self._fds.append(everywhere.directory(place.parts))
        unpacker.tree = Tree(self._fds[1], follow=False)
        unpacker.rules = replace(unpacker.rules, rename=place.name)

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)
