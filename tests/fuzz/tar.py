"""Tar archives into a directory, in this process: nothing outside of it changes, and only ArchiveError."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from collections.abc import Hashable
from pathlib import Path

from gcsagent.tarball.errors import ArchiveError
from gcsagent.tarball.source import Source
from gcsagent.tarball.tree import Tree
from gcsagent.tarball.unpack import TEMPORARY, Rules, Unpacker
from protocol.errors import Code
from tests.fuzz.target import Broken

MOST = 1 << 20
"""Bytes an archive may unpack to; it may say that it is far more."""


def archives() -> list[bytes]:
    """One of each kind of member, in each format, and what leads astray."""
    found = []
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        for names in (("a", "a/b", "l", "h"), ("d" * 120, "../victim"), ("x",)):
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
                for number, name in enumerate(names):
                    _add(archive, name, number, form)
            found.append(buffer.getvalue().rstrip(b"\0") + bytes(1536))
    return found


def _add(archive: tarfile.TarFile, name: str, number: int, form: int) -> None:
    member = tarfile.TarInfo(name)
    member.mode = 0o755
    member.type = (tarfile.DIRTYPE, tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE)[number % 4]
    data = b""
    if member.type == tarfile.REGTYPE:
        data = b"content of " + name.encode()
        member.size = len(data)
    elif member.type == tarfile.SYMTYPE:
        member.linkname = "../victim"
    elif member.type == tarfile.LNKTYPE:
        member.linkname = "a/b"
    if form == tarfile.PAX_FORMAT:
        member.pax_headers = {"SCHILY.xattr.user.x": "y", "mtime": "1.5", "comment": "é" * 20}
    archive.addfile(member, io.BytesIO(data))


class Tar:
    name, coverage = "tar", True

    def open(self, directory: Path) -> None:
        self._root, self._into, self._victim = directory, directory / "root", directory / "victim"
        self._victim.mkdir()
        (self._victim / "file").write_text("mine")
        self._was = self._victims()

    def close(self) -> None:
        pass

    def seeds(self) -> list[bytes]:
        return archives()

    def execute(self, data: bytes) -> Hashable:
        self._into.mkdir()
        descriptors = os.listdir("/proc/self/fd")
        root = os.open(self._into, os.O_PATH | os.O_DIRECTORY)
        pieces = iter([data[at : at + 1000] for at in range(0, len(data), 1000)])
        outcome: Hashable
        try:
            rules = Rules(max_entries=1000, max_bytes=MOST, special=len(data) % 2 == 1)
            tally = Unpacker(Tree(root), ["in"][: len(data) % 3], rules).run(
                Source(lambda: next(pieces, b""), most=1 << 20)
            )
            outcome = tally.entries, tally.skipped
        except ArchiveError as error:
            if error.code is Code.INTERNAL:
                raise Broken(f"INTERNAL: {os.strerror(error.errno)}") from error
            outcome = str(error.code), error.errno
        finally:
            os.close(root)
            left = [
                name for _, _, names in os.walk(self._into) for name in names if name.startswith(TEMPORARY)
            ]
            shutil.rmtree(self._into)
        if left:
            raise Broken("a temporary file is left")
        if len(os.listdir("/proc/self/fd")) != len(descriptors):
            raise Broken("a descriptor is left open")
        if self._victims() != self._was:
            raise Broken("something outside has changed")
        return outcome

    def _victims(self) -> list[object]:
        """The directory beside, and that nothing else has come to be there."""
        info = (self._victim / "file").stat()
        return [
            sorted(os.listdir(self._root)),
            sorted(os.listdir(self._victim)),
            info.st_mode,
            info.st_nlink,
            info.st_mtime_ns,
        ]
