"""Storage by way of a client: what ``gcsctl storage`` is made of."""

from __future__ import annotations

from gcsagent.host.client import MAX_PAGES, Client, endless
from protocol.errors import Code, RpcError
from protocol.families.storage import (
    FreezeStorage,
    ListMounts,
    MountList,
    MountRef,
    MountState,
    MountStorage,
    Trimmed,
    Unmounted,
    UnmountStorage,
)


async def mount(client: Client, params: MountStorage, *, deadline: float | None = None) -> MountState:
    """Mounts something, or joins those who hold it already. Raises what :meth:`Client.call` raises."""
    result: MountState = await client.call("storage.mount", params, deadline=deadline)
    return result


async def unmount(client: Client, mount: str, *, dependents: bool = False) -> tuple[str, ...]:
    """Drops a holder; returns the ids that are mounted no more, none if others still hold it.

    ``dependents``: unmount first what is built on it.
    """
    result: Unmounted = await client.call("storage.unmount", UnmountStorage(mount, dependents))
    return result.unmounted


_BEGUN_ANEW = 8
"""How often a list is, whose last known mount went before the next page was asked for."""


async def list_mounts(client: Client) -> tuple[MountState, ...]:
    """In the order they were mounted, as many requests as it takes."""
    found: list[MountState] = []
    left = _BEGUN_ANEW
    for _ in range(MAX_PAGES):
        after = found[-1].mount if found else ""
        try:
            page: MountList = await client.call("storage.list", ListMounts(after))
        except RpcError as error:
            if error.code is not Code.NOT_FOUND or not left:
                raise
            found, left = [], left - 1
            continue
        known = {each.mount for each in found}
        found += page.mounts
        if not page.left_out or not page.mounts or page.mounts[-1].mount in known:
            return tuple(found)
    raise endless("storage.list")


async def trim(client: Client, mount: str) -> int:
    """Gives what a file system does not use back to its device; returns how many bytes, at the most."""
    result: Trimmed = await client.call("storage.trim", MountRef(mount))
    return result.bytes


async def freeze(client: Client, mount: str, *, seconds: float = 60.0) -> None:
    """Flushes a file system and holds its writers off; after ``seconds`` it thaws by itself."""
    await client.call("storage.freeze", FreezeStorage(mount, round(seconds * 1000)))


async def thaw(client: Client, mount: str) -> None:
    await client.call("storage.thaw", MountRef(mount))
