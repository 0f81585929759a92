"""A named VM that runs, found by its name from any process of this host, one that was restarted for instance.

vm = FoundVm.named("dev")
async with await Client.connect(vm.address) as client:
    await vm.plug_disk(Path("data.img"), "data")
    await storage.mount(client, MountStorage("data", MountKind.BLOCK, device=Device(serial="data")))
print(await vm.wait())
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from gcsagent.host.vm import control
from gcsagent.host.vm.diskplug import DiskPlug, PluggedDisk
from gcsagent.host.vm.errors import VmNotFound, VmNotRunning
from gcsagent.host.vm.hotplug import HotPlug
from gcsagent.host.vm.named import NamedVm, VmStore
from gcsagent.host.vm.nicplug import NicPlug, PluggedNic
from gcsagent.host.vm.process import open_pidfd, wait_pidfd
from gcsagent.host.vm.share import Share
from gcsagent.host.vm.shareplug import PluggedShare

_ORDER_SECONDS = 60.0


class FoundVm:
    """What `VirtualMachine` can do, for a VM that another process launched.

    Every method that plugs raises VmNotRunning once the VM has ended, also when another has its name by then.

    Attributes:
        record: what was recorded of it when it was found.
    """

    def __init__(self, store: VmStore, record: NamedVm) -> None:
        """Use `named`."""
        self.record = record
        self._store = store
        self._monitor = asyncio.Lock()

    @classmethod
    def named(cls, name: str, store: VmStore | None = None) -> FoundVm:
        """The VM that has this name now.

        Raises:
            VmNotFound, VmNotRunning: there is none.
        """
        store = store or VmStore()
        return cls(store, store.running(name))

    @property
    def address(self) -> str:
        """Where its agent is dialled; stays as long as it runs."""
        assert self.record.address is not None  # it was running
        return self.record.address

    async def wait(self) -> str | None:
        """Returns once it has ended: why, if it crashed; None if it was stopped, or ended in order."""
        pidfd = open_pidfd(self.record.keeper_pid, self.record.keeper_started)
        if pidfd is not None:
            try:
                await wait_pidfd(pidfd, None)
            finally:
                os.close(pidfd)
        try:
            left = self._store.get(self.record.name)
        except VmNotFound:
            return None
        return left.reason if self._is(left) else None

    async def plug_disk(self, path: Path, serial: str, *, read_only: bool = False) -> None:
        """Raises what `VirtualMachine.plug_disk` raises."""
        async with self._ports() as ports:
            await DiskPlug(ports).plug(path, serial, read_only=read_only)

    async def unplug_disk(self, serial: str, timeout: float = 30.0) -> None:
        """Raises what `VirtualMachine.unplug_disk` raises."""
        async with self._ports() as ports:
            await DiskPlug(ports).unplug(serial, timeout)

    async def disks(self) -> list[PluggedDisk]:
        """All disks it has, by serial number. Raises QmpError."""
        async with self._ports() as ports:
            return await DiskPlug(ports).all()

    async def plug_nic(self, mac: str | None = None) -> str:
        """Raises what `VirtualMachine.plug_nic` raises."""
        async with self._ports() as ports:
            return await NicPlug(ports).plug(mac)

    async def unplug_nic(self, mac: str, timeout: float = 30.0) -> None:
        """Raises what `VirtualMachine.unplug_nic` raises."""
        async with self._ports() as ports:
            await NicPlug(ports).unplug(mac, timeout)

    async def nics(self) -> list[PluggedNic]:
        """All network cards it has, by address. Raises QmpError."""
        async with self._ports() as ports:
            return await NicPlug(ports).all()

    async def plug_share(self, share: Share) -> None:
        """Raises what `VirtualMachine.plug_share` raises."""
        path = str(share.path.absolute())
        await self._ask("share-add", path=path, tag=share.tag, read_only=share.read_only)

    async def unplug_share(self, tag: str, timeout: float = 30.0) -> None:
        """Raises what `VirtualMachine.unplug_share` raises."""
        await self._ask("share-rm", timeout, tag=tag, timeout=timeout)

    async def shares(self) -> list[PluggedShare]:
        """All shares it has, by tag."""
        return [PluggedShare(**each) for each in await self._ask("share-ls")]

    async def replug_vsock(self, timeout: float = 60.0) -> None:
        """Raises what `VirtualMachine.replug_vsock` raises. Leaves a new `record`."""
        self.record = NamedVm(**await self._ask("replug", timeout, timeout=timeout))

    @asynccontextmanager
    async def _ports(self) -> AsyncIterator[HotPlug]:
        # QEMU has one ear: who comes second would wait for it with a deadline.
        async with self._monitor:
            self._check()
            async with HotPlug.at(self.record.qmp) as ports:
                yield ports

    async def _ask(self, order: str, seconds: float = 0.0, /, **arguments: Any) -> Any:
        self._check()
        path = self._store.control(self.record.name)
        return await control.ask(path, order, arguments, seconds + _ORDER_SECONDS)

    def _check(self) -> None:
        name = self.record.name
        if not self._is(self._store.running(name)):
            raise VmNotRunning(f"the VM {name!r} that was found has ended; another one has its name")

    def _is(self, other: NamedVm) -> bool:
        mine = self.record
        return (other.keeper_pid, other.keeper_started) == (mine.keeper_pid, mine.keeper_started)
