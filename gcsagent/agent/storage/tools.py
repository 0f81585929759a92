"""The programs that do the work: mount, umount, mkfs, dmsetup and the like, run by the supervisor.

Each runs under its mount's own key and is remembered by it until it has ended here, so that an agent which
finds a mount half made can wait for what is still at work on it.
"""

from __future__ import annotations

import errno
import os

from gcsagent.agent.calls import Caller, CannotStart, Outcome, capture, captured
from gcsagent.agent.failures import not_started, tool_failed
from gcsagent.agent.storage.table import Entry
from protocol.errors import Code, RpcError

_PACKAGES = {
    "mkfs.ext4": "e2fsprogs",
    "mkfs.xfs": "xfsprogs",
    "dmsetup": "dmsetup",
    "mkswap": "busybox or util-linux",
}


class Tools:
    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    async def run(
        self, entry: Entry, argv: list[str], seconds: float, *, fds: dict[int, int] | None = None, what: str
    ) -> Outcome:
        """Raises RpcError, naming ``what`` could not be done, when it fails or takes longer."""
        try:
            outcome = await self._caller.run(argv, seconds, fds=fds, key=entry.call)
        except CannotStart as error:
            if error.errno != errno.ENOENT:
                raise not_started(error, f"cannot {what}: {error}") from error
            hint = f" (package {_PACKAGES[argv[0]]})" if argv[0] in _PACKAGES else ""
            raise RpcError(
                Code.UNIMPLEMENTED, f"cannot {what}: this guest has no {argv[0]}{hint}", tool=argv[0]
            ) from error
        finally:
            self._caller.forget(entry.call)
        if outcome.timed_out:
            raise RpcError(Code.DEADLINE_EXCEEDED, f"cannot {what}: {argv[0]} took more than {seconds:.0f} s")
        if outcome.status != 0:
            words = outcome.stderr or f"{argv[0]} ended with status {outcome.status}"
            raise tool_failed(outcome, f"cannot {what}: {words}")
        return outcome

    async def output(self, entry: Entry, argv: list[str], seconds: float, what: str) -> str:
        """The end of what it writes to standard output. Raises RpcError."""
        fd = capture("stdout")
        try:
            await self.run(entry, argv, seconds, fds={1: fd}, what=what)
            return captured(fd)
        finally:
            os.close(fd)

    async def read(self, entry: Entry, device: str, offset: int, size: int, seconds: float) -> bytes:
        """So many bytes of a device, fewer where it ends. Raises RpcError.

        By a program: a disk that hangs must not take the agent with it.
        """
        block = 4096
        skip, ahead = divmod(offset, block)
        count = -(-(ahead + size) // block)
        fd = capture("head", count * block)
        argv = ["dd", f"if={device}", f"bs={block}", f"skip={skip}", f"count={count}"]
        try:
            await self.run(entry, argv, seconds, fds={1: fd}, what=f"read {device}")
            return os.pread(fd, size, ahead)
        finally:
            os.close(fd)

    async def settled(self, entry: Entry) -> None:
        """Waits for what an earlier agent had begun."""
        await self._caller.join(entry.call)
        self._caller.forget(entry.call)
