"""Who would notice if a mount went: other mounts, and containers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

from gcsagent.agent import mountinfo
from gcsagent.agent.container import Container
from gcsagent.agent.mountinfo import below
from gcsagent.agent.storage.table import Entry, Table


def built_on(table: Table, entry: Entry) -> list[Entry]:
    """The mounts that lie on it or are made from it, and those on them in turn; the newest first."""
    found: list[Entry] = []
    new = [entry]
    while new:
        under = new.pop()
        if not under.target:
            continue
        for other in table:
            if other is not entry and other not in found and _uses(other.paths(), under.target):
                found.append(other)
                new.append(other)
    return sorted(found, key=lambda each: each.number, reverse=True)


async def containers(there: Iterable[Container], target: str) -> list[str]:
    """Ids of those whose root, layer or mounts come from ``target`` or below it."""
    overlays = {mount.point: mount.layers() for mount in mountinfo.read() if mount.fstype == "overlay"}
    found = []
    for container in list(there):
        if _uses([container.root, *overlays.get(container.root, ()), *_sources(container)], target):
            found.append(container.ident)
        await asyncio.sleep(0)  # each has a file to read; there may be a thousand
    return found


def foreign(table: Table, entry: Entry) -> list[str]:
    """Where something is mounted in it, or over it, that is not in the table."""
    ours = {other.mount_id for other in table}
    return [
        mount.point
        for mount in mountinfo.read()
        if mount.ident not in ours
        and mount.ident > 0
        and below(mount.point, entry.target)
        and mount.ident not in entry.before
    ]


def _uses(paths: Iterable[str], target: str) -> bool:
    return any(below(path, target) for path in paths if path)


def _sources(container: Container) -> list[str]:
    try:
        spec: dict[str, Any] = container.directory.read("config.json")
        sources = [str(mount.get("source", "")) for mount in spec.get("mounts", [])]
        return [*sources, str(spec.get("root", {}).get("path", ""))]
    except (OSError, ValueError, AttributeError, TypeError):
        return []  # it is being made, or is broken: what it has mounted keeps the kernel from unmounting
