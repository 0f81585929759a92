"""A VM's memory and devices to a file and back: QEMU's migration (QEMU docs, devel/migration) and its events.

A stopped VM stays stopped, here and there. QEMU refuses devices whose state is in another process, such as
vhost-user-vsock: they are unplugged before.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import tenacity

from gcsagent.host.vm.errors import QmpClosed, QmpError
from gcsagent.host.vm.qmp import QmpClient, QmpEvent

# No limit in practice: QEMU's own is made for networks that others use as well.
_BANDWIDTH = 1 << 40

_CANCEL_SECONDS = 20.0

_FINAL_SECONDS = 10.0


class _NotYet(QmpError):
    """It is still at it."""


class Migration:
    """Of one QEMU. One at a time."""

    def __init__(self, qmp: QmpClient) -> None:
        self._qmp = qmp
        self._ending: asyncio.Future[str] | None = None

    def on_event(self, event: QmpEvent) -> None:
        """To be told of every event of the monitor."""
        if event.name != "MIGRATION" or self._ending is None or self._ending.done():
            return
        status = str(event.data.get("status"))
        if status in ("completed", "failed", "cancelled"):
            self._ending.set_result(status)

    def abandon(self) -> None:
        """The VM has ended."""
        if self._ending is not None and not self._ending.done():
            self._ending.set_exception(QmpClosed("the VM has ended"))
            # Whoever waited may have gone.
            self._ending.exception()

    async def save(self, path: Path, timeout: float) -> None:
        """Writes a stopped VM to a new file.

        Args:
            timeout: seconds it may take.

        Raises:
            QmpError: QEMU could not, or not in that time; the VM can go on.
        """
        await self._qmp.execute("migrate-set-parameters", {"max-bandwidth": _BANDWIDTH})
        try:
            await self._run("migrate", path, timeout)
        except BaseException:
            await self._cancel()
            with contextlib.suppress(QmpError):
                await self._finalized()
            raise
        await self._finalized()

    async def load(self, path: Path, timeout: float) -> None:
        """Reads a VM from a file into a QEMU that was started to wait for one; it is stopped then.

        Raises:
            QmpError: QEMU could not, or not in that time; it is of no use then.
        """
        await self._run("migrate-incoming", path, timeout)

    async def _run(self, command: str, path: Path, timeout: float) -> None:
        events = [{"capability": "events", "state": True}]
        await self._qmp.execute("migrate-set-capabilities", {"capabilities": events})
        ending = self._ending = asyncio.get_running_loop().create_future()
        await self._qmp.execute(command, {"channels": [_channel(path)]})
        try:
            async with asyncio.timeout(timeout):
                status = await asyncio.shield(ending)
        except TimeoutError:
            raise QmpError(f"QEMU has not done with {path} within {timeout:g} s") from None
        if status != "completed":
            raise QmpError(await self._why(status))

    async def _finalized(self) -> None:
        """Until QEMU lets the VM go on. It announces the end before that, and does not tell when it is so
        far: "cont" is refused meanwhile ("Migration is not finalized yet", QEMU 10.0)."""
        async for attempt in tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(_NotYet),
            wait=tenacity.wait_exponential(multiplier=0.002, max=0.5),
            stop=tenacity.stop_after_delay(_FINAL_SECONDS),
            reraise=True,
        ):
            with attempt:
                answer = await self._qmp.execute("query-status")
                if isinstance(answer, dict) and answer.get("status") == "finish-migrate":
                    raise _NotYet("QEMU does not come to an end with what it has written")

    async def _why(self, status: str) -> str:
        answer = await self._qmp.execute("query-migrate")
        return str(answer.get("error-desc") or f"QEMU says {status}, and not why")

    async def _cancel(self) -> None:
        """Afterwards QEMU no longer writes."""
        if self._ending is None or self._ending.done():
            return
        with contextlib.suppress(QmpError, TimeoutError):
            await self._qmp.execute("migrate_cancel")
            async with asyncio.timeout(_CANCEL_SECONDS):
                await asyncio.shield(self._ending)


def _channel(path: Path) -> dict[str, Any]:
    return {"channel-type": "main", "addr": {"transport": "file", "filename": str(path), "offset": 0}}
