"""Directories that the host shares: their virtiofs tags, found in sysfs and waited for.

Linux lists them since 6.9 (fs/fuse/virtio_fs.c). Under an older one, mounting fails when a tag is not there.
"""

from __future__ import annotations

import asyncio
import contextlib
import glob
import os

from gcsagent.agent import uevents
from protocol.errors import Code, RpcError

_LIST = "/sys/fs/virtiofs"


async def arrived(tag: str, seconds: float, where: str = _LIST) -> None:
    """Returns as soon as the tag is there. Raises NOT_FOUND when it does not come."""
    with uevents.changes("virtiofs") as changed:
        try:
            async with asyncio.timeout(seconds):
                while os.path.isdir(where) and tag not in there(where):
                    await changed.wait()
                    changed.clear()
        except TimeoutError:
            raise RpcError(
                Code.NOT_FOUND,
                f"tag: no virtiofs device with the tag {tag} came within {seconds:g} s; there are:"
                f" {', '.join(there(where)[:32]) or 'none'}",
                field="tag",
            ) from None


def there(where: str = _LIST) -> list[str]:
    found = []
    for path in glob.glob(os.path.join(where, "*", "tag")):
        with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
            found.append(file.read().rstrip("\n"))
    return sorted(found)
