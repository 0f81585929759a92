"""Copies disk images: by sharing their blocks where the file system can, and with their holes otherwise."""

from __future__ import annotations

import os
from pathlib import Path

from gcsagent.host.vm.errors import DiskError
from gcsagent.host.vm.process import run

_SECONDS = 3600.0


async def copy(source: Path, target: Path) -> None:
    """Makes `target` a file of its own with the contents of a file or block device.

    Raises:
        DiskError: cp failed, or took more than an hour.
    """
    argv: list[str | Path] = ["cp", "--reflink=auto", "--sparse=always", "--", source, target]
    try:
        status, said = await run("cp", argv, _SECONDS)
    except TimeoutError:
        raise DiskError(f"copying {source} took more than {_SECONDS:g} s") from None
    if status != 0:
        raise DiskError(f"cannot copy {source}: {said or f'cp exited {status}'}")


async def link_or_copy(source: Path, target: Path) -> None:
    """Likewise for a file that nobody ever writes to: a second name for it will do.

    Raises:
        DiskError: as `copy`.
    """
    try:
        os.link(source, target)
    except OSError:
        await copy(source, target)
