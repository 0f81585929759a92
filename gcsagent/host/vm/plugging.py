"""What a running VM can be given and have taken away: disks, network cards, shared directories."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

from gcsagent.host.vm.diskplug import DiskPlug, PluggedDisk
from gcsagent.host.vm.guest import Guest
from gcsagent.host.vm.nicplug import NicPlug
from gcsagent.host.vm.share import Share
from gcsagent.host.vm.shareplug import PluggedShare


class Plugging(ABC):
    """The part of VirtualMachine that plugs devices in and out."""

    @property
    @abstractmethod
    def guest(self) -> Guest:
        """The running guest. Raises VmError when there is none yet."""

    async def plug_disk(self, path: Path, serial: str, *, read_only: bool = False) -> None:
        """Gives the running guest a raw image file or block device as a disk; `storage.mount` waits for it.

        Raises:
            InvalidVmConfig, DiskError: it cannot be a disk of this VM.
            QmpError: QEMU refused.
        """
        await DiskPlug(self.guest.ports).plug(path, serial, read_only=read_only)

    async def unplug_disk(self, serial: str, timeout: float = 30.0) -> None:
        """Takes a disk away again; unmount it in the guest first.

        Args:
            timeout: seconds the guest may take to let go of it.

        Raises:
            DiskError: it was not plugged in.
            QmpError: the guest or QEMU refused.
        """
        await DiskPlug(self.guest.ports).unplug(serial, timeout)

    async def disks(self) -> list[PluggedDisk]:
        """All disks it has, by serial number. Raises QmpError."""
        return await DiskPlug(self.guest.ports).all()

    async def plug_nic(self, mac: str | None = None) -> str:
        """Gives the running guest a network card with the user-mode network; returns its address.

        Raises:
            InvalidVmConfig, PlugError: it cannot be a card of this VM.
            QmpError: QEMU refused.
        """
        return await NicPlug(self.guest.ports).plug(mac)

    async def unplug_nic(self, mac: str, timeout: float = 30.0) -> None:
        """Takes a network card away again.

        Args:
            timeout: seconds the guest may take to let go of it.

        Raises:
            PlugError: it was not plugged in.
            QmpError: the guest or QEMU refused.
        """
        await NicPlug(self.guest.ports).unplug(mac, timeout)

    async def plug_share(self, share: Share) -> None:
        """Shares one more directory with the running guest; `storage.mount` waits for its tag.

        Raises:
            InvalidVmConfig, ShareError, PlugError: it cannot be a share of this VM.
            LaunchError, ToolMissing: its virtiofsd did not start.
            QmpError: QEMU refused.
        """
        await self.guest.shares.plug(self.guest.ports, share)

    async def unplug_share(self, tag: str, timeout: float = 30.0) -> None:
        """Takes a share away again; unmount it in the guest first: what is left there gives errors.

        Args:
            timeout: seconds the guest may take to let go of it.

        Raises:
            ShareError: it was not plugged in.
            QmpError: the guest or QEMU refused.
        """
        await self.guest.shares.unplug(self.guest.ports, tag, timeout)

    def shares(self) -> list[PluggedShare]:
        """All shares it has, by tag."""
        return self.guest.shares.all()
