"""The members of an archive, one after the other, with what is believed of their headers."""

from __future__ import annotations

import struct
import tarfile
from collections.abc import Iterator

from gcsagent.tarball.errors import damaged, shown
from gcsagent.tarball.source import Source

MAX_SIZE = (1 << 63) - 1
"""What the kernel's loff_t holds."""

_RUBBISH = (
    tarfile.TarError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    TypeError,
    EOFError,
    RecursionError,
    struct.error,
)
"""What tarfile raises over headers it cannot make sense of."""


def members(source: Source) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """Each member, and how many bytes of the archive are its contents, padding included.

    When it is given out, ``source`` stands before those; as many of them may be read from it as are wanted.
    Raises ArchiveError, also for an archive that ends without saying so, and what ``source`` raises.
    """
    tar: tarfile.TarFile | None = None
    while True:
        source.begin_headers()
        try:
            if tar is None:
                tar = tarfile.TarFile(
                    fileobj=source,  # type: ignore[arg-type]
                    encoding="utf-8",
                    errors="surrogateescape",
                )
            member = tar.next()
        except _RUBBISH as error:
            raise damaged(f"no tar, or damaged: {error}"[:300]) from error
        source.end_headers()
        if member is None:
            if not source.at_end_marker():
                raise damaged("it is cut off, or damaged: there is no end where it ends")
            return
        tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
        if member.offset_data != source.tell():
            raise damaged(f"{shown(member.name)} has sizes that contradict each other")
        yield member, tar.offset - member.offset_data
