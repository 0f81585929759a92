"""The shares of one running VM: their daemons, watched until the VM ends, and those plugged in later.

QEMU's vhost-user-fs never reconnects, and a guest waits for ever for what a dead daemon does not answer: a
daemon that dies takes the VM with it, and is named as the reason.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gcsagent.host.vm.errors import InvalidVmConfig, LaunchError, QmpError, ShareError
from gcsagent.host.vm.hotplug import HotPlug, no_plugged_one
from gcsagent.host.vm.qemu import share_device, share_name
from gcsagent.host.vm.share import ServedShare, Share


@dataclass(frozen=True, slots=True)
class PluggedShare:
    """A share the VM has, and whether it can be unplugged."""

    tag: str
    path: str
    read_only: bool
    removable: bool


class Shares:
    """To be given to one QEMU.

    Attributes:
        on_lost: told, as one line, that a daemon has died; its exit status comes first.
    """

    def __init__(self, directory: Path) -> None:
        """`directory` is private."""
        self.on_lost: Callable[[int, str], None] = lambda status, how: None
        self._directory = directory
        self._served: dict[str, ServedShare] = {}
        self._plugged: set[str] = set()
        self._watching: dict[str, asyncio.Task[None]] = {}
        self._changing = asyncio.Lock()

    def serve(self, share: Share) -> int:
        """Starts the daemon of a share that is there from the boot on; the descriptor is for QEMU.

        Raises:
            InvalidVmConfig: the tag is taken.
            ShareError, LaunchError, ToolMissing: it cannot be shared.
        """
        self._check_free(share)
        served = self._served[share.tag] = ServedShare.start(share, self._directory)
        return served.fd

    def handed_over(self) -> None:
        """QEMU has its copies of the descriptors."""
        for served in self._served.values():
            served.handed_over()
            self._watch(served)

    def all(self) -> list[PluggedShare]:
        """The VM's shares, by tag."""
        shares = [self._served[tag].share for tag in sorted(self._served)]
        return [
            PluggedShare(each.tag, str(each.path), each.read_only, each.tag in self._plugged)
            for each in shares
        ]

    def pids(self) -> tuple[int, ...]:
        """The process ids of the daemons."""
        return tuple(served.pid for served in self._served.values())

    async def plug(self, ports: HotPlug, share: Share) -> None:
        """Gives the guest a share; `storage.mount` waits for it.

        Raises:
            InvalidVmConfig: the tag is taken.
            ShareError, LaunchError, ToolMissing: it cannot be shared.
            PlugError: all ports are taken.
            QmpError: QEMU refused.
        """
        async with self._changing:
            self._check_free(share)
            served = ServedShare.start(share, self._directory)
            try:
                await self._hand_over(ports, served)
            except BaseException as error:
                why = await served.failure() if isinstance(error, QmpError) else ""
                served.close()
                await _take_back(ports, share.tag)
                if why:
                    raise LaunchError(why) from error
                raise
            self._served[share.tag] = served
            self._plugged.add(share.tag)
            self._watch(served)

    async def unplug(self, ports: HotPlug, tag: str, timeout: float) -> None:
        """Takes a share from the guest, whether or not that still uses it.

        Args:
            timeout: seconds the guest may take to let go of it.

        Raises:
            ShareError: there is no such share, or not one that was plugged in.
            QmpError: the guest or QEMU refused.
        """
        async with self._changing:
            served = self._served.get(tag)
            if served is None or tag not in self._plugged:
                raise ShareError(f"share {tag} {no_plugged_one(there=served is not None)}")
            self._watching[tag].cancel()
            try:
                # Asked, not remembered: an earlier attempt may have come to its end after its deadline.
                if share_name(tag) in await ports.plugged():
                    await ports.remove(share_name(tag), timeout)
                await ports.drop("chardev-remove", {"id": share_name(tag)})
            except BaseException:
                self._watch(served)
                raise
            self._forget(tag)

    async def ended(self, timeout: float) -> None:
        """Returns once all daemons have exited, as they do after QEMU, or after `timeout` seconds."""
        if self._watching:
            await asyncio.wait(self._watching.values(), timeout=timeout)

    def close(self) -> None:
        """Ends all daemons; may be called again."""
        for tag in list(self._served):
            self._forget(tag)

    async def _hand_over(self, ports: HotPlug, served: ServedShare) -> None:
        tag, name = served.share.tag, share_name(served.share.tag)
        await ports.qmp.execute("getfd", {"fdname": name}, fd=served.fd)
        served.handed_over()
        address = {"type": "fd", "data": {"str": name}}
        backend = {"type": "socket", "data": {"addr": address, "server": False}}
        await ports.qmp.execute("chardev-add", {"id": name, "backend": backend})
        await ports.add(share_device(tag))

    def _check_free(self, share: Share) -> None:
        if share.tag in self._served:
            raise InvalidVmConfig(f"the VM has a share with the tag {share.tag} already")

    def _watch(self, served: ServedShare) -> None:
        self._watching[served.share.tag] = asyncio.create_task(self._tell_of(served))

    async def _tell_of(self, served: ServedShare) -> None:
        self.on_lost(*await served.ended())

    def _forget(self, tag: str) -> None:
        self._plugged.discard(tag)
        watching = self._watching.pop(tag, None)
        if watching is not None:
            watching.cancel()
        self._served.pop(tag).close()


async def _take_back(ports: HotPlug, tag: str) -> None:
    # How far it came decides which of the two QEMU still has.
    with contextlib.suppress(QmpError):
        await ports.qmp.execute("closefd", {"fdname": share_name(tag)})
    with contextlib.suppress(QmpError):
        await ports.qmp.execute("chardev-remove", {"id": share_name(tag)})
