"""The throw-away writable layer over a container's root."""

from __future__ import annotations

import os

from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_exponential

from gcsagent.agent import mountinfo
from gcsagent.agent.calls import Caller, CannotStart
from gcsagent.agent.failures import not_started, tool_failed
from gcsagent.agent.process_dir import ContainerDir
from protocol.errors import Code, RpcError

SECONDS = 30.0
BUSY_SECONDS = 5.0


async def mount(
    caller: Caller, directory: ContainerDir, lower: str, owner: tuple[int, int] | None = None
) -> str:
    """Mounts an overlay over ``lower``; returns where. Raises RpcError.

    ``owner`` (uid and gid) is whose the root directory shall be: root's of a user namespace.
    """
    if any(character in lower for character in ",:\\"):
        raise RpcError(
            Code.INVALID_ARGUMENT,
            f"spec.root.path: {lower!r} has a comma, colon or backslash, which overlay options cannot carry",
        )
    upper, work, root = directory.overlay_directories()
    if owner is not None:
        os.chown(upper, *owner)
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    await run(caller, ["mount", "-t", "overlay", "-o", options, "overlay", root], "mount the overlay")
    return root


def lower_of(directory: ContainerDir) -> str:
    """The lower directory of the overlay that is mounted there. Raises ValueError."""
    root = os.path.join(directory.path, "root")
    for mounted in mountinfo.at(root, mountinfo.read()):
        for option in mounted.options:
            if mounted.fstype == "overlay" and option.startswith("lowerdir="):
                return option.removeprefix("lowerdir=")
    raise ValueError(f"nothing is mounted on {root}")


async def unmount(caller: Caller, directory: ContainerDir) -> None:
    """Raises RpcError when it stays in use. The helpers of a runtime that was killed end by themselves."""
    await unmount_path(caller, os.path.join(directory.path, "root"), "unmount the overlay")


async def unmount_path(caller: Caller, path: str, what: str) -> None:
    """Likewise; nothing is done where nothing is mounted."""
    attempts = AsyncRetrying(
        retry=retry_if_exception_type(RpcError),
        stop=stop_after_delay(BUSY_SECONDS),
        wait=wait_exponential(multiplier=0.01, max=0.5),
        reraise=True,
    )
    if os.path.ismount(path):
        await attempts(run, caller, ["umount", path], what)


async def run(caller: Caller, argv: list[str], what: str) -> None:
    """Raises RpcError: ``what`` is what cannot be done."""
    try:
        outcome = await caller.run(argv, SECONDS)
    except CannotStart as error:
        raise not_started(error, f"cannot {what}: {error}") from error
    if outcome.status != 0:
        raise tool_failed(outcome, f"cannot {what}: {outcome.stderr or f'status {outcome.status}'}")
