"""``archive.*``: files in and out of the guest or of a container, as tar archives."""

from __future__ import annotations

from typing import Annotated

from protocol import checks
from protocol.dataclass import dataclass
from protocol.method import Method

_COUNT = checks.Between(1, 1 << 40)


@dataclass(frozen=True, slots=True)
class PutArchive:
    """A tar archive that follows, into a directory."""

    container: checks.Id | None = None
    """Whose files; absent, the guest's own."""
    path: checks.Path = "/"
    """Where the entries go: a directory that is there; or, with `copy`, where the copy goes."""
    make: bool = False
    """Make the directory `path` if its parent is there."""
    copy: checks.FileName | None = None
    """The archive is one file or directory of this name: it goes into `path` if that is a directory, else
    it becomes `path`."""
    directory: bool = False
    """With `copy`: it is a directory, which is refused before it is sent where it cannot go."""
    special: bool = False
    """Devices and fifos may be made; without, an archive that has one is refused."""
    max_entries: Annotated[int, _COUNT] | None = None
    """How many entries there may be; absent, 10,000,000."""
    max_bytes: Annotated[int, _COUNT] | None = None
    """How large the archive, and its files together, may be; absent, no limit."""


@dataclass(frozen=True, slots=True)
class GetArchive:
    """A file or directory as a tar archive."""

    path: checks.Path
    """What to read; the entries are called after its last name, or `.` if it is `/` or ends in `/.`."""
    container: checks.Id | None = None
    """Whose files; absent, the guest's own."""
    follow: bool = False
    """If `path` is a symlink, what it leads to; with a slash at its end that is so anyway."""
    digest: bool = False
    """Have the SHA-256 of the archive in the result."""
    max_entries: Annotated[int, _COUNT] | None = None
    """How many entries there may be; absent, 10,000,000."""
    max_bytes: Annotated[int, _COUNT] | None = None
    """How large the archive may be; absent, no limit."""


@dataclass(frozen=True, slots=True)
class Archived:
    bytes: int
    """Of the archive, from its first to its last."""
    entries: int
    """Files, directories and other things in it."""
    skipped: int = 0
    """What was left out: sockets, what vanished under way, extended attributes the file system has not."""
    sha256: str = ""
    """Of the archive, where it was asked for."""


@dataclass(frozen=True, slots=True)
class ArchiveData:
    """Notification ``archive.data``: the archive's next bytes."""

    data: checks.Chunk
    """At most `MAX_CHUNK` bytes."""


@dataclass(frozen=True, slots=True)
class ArchiveEnd:
    """Notification ``archive.end``: the archive has been sent whole."""

    bytes: checks.Offset
    """How many there were."""
    sha256: checks.Sha256 | None = None
    """Of the archive; given, it is checked."""


READY, DATA, END = "archive.ready", "archive.data", "archive.end"
"""Notifications on the connection of an ``archive.put`` or ``archive.get``."""

METHODS = (
    Method("archive.put", PutArchive, Archived, None),
    Method("archive.get", GetArchive, Archived, None),
)
