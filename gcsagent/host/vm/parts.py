"""What a VM is made of: programs, guest image and disks, found or made before anything is started."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gcsagent.host.vm import tools
from gcsagent.host.vm.accel import Accelerator
from gcsagent.host.vm.config import DEFAULT_PORT, VmConfig
from gcsagent.host.vm.disk import Disk, rootfs_disk
from gcsagent.host.vm.errors import DiskError
from gcsagent.host.vm.nic import Nic
from gcsagent.host.vm.qemu import QemuConfig
from gcsagent.host.vm.shareplug import Shares
from gcsagent.host.vm.tools import GuestImage
from gcsagent.host.vm.vsockdev import VsockChoice, VsockDevice


@dataclass(frozen=True, slots=True)
class Parts:
    """What every attempt at booting uses."""

    qemu: Path
    image: GuestImage
    disks: tuple[Disk, ...]
    vsock: VsockChoice

    @classmethod
    async def find(
        cls,
        config: VmConfig,
        accelerator: Accelerator,
        vsock: VsockChoice,
        scratch: Callable[[], Path],
        progress: Callable[[str], None],
    ) -> Parts:
        """Looks for all that `config` needs; `scratch` makes a directory for a root directory's image.

        Raises:
            ToolMissing, UnsuitableTool, DiskError.
        """
        qemu = tools.find_tool(tools.QEMU)
        image = tools.find_image(config.image, config.kernel)
        if vsock.kind == "vhost-user-vsock":
            tools.find_tool(tools.VHOST_DEVICE_VSOCK)
        if config.shares:
            tools.find_tool(tools.VIRTIOFSD)
        await asyncio.to_thread(tools.check_qemu, qemu, accelerator)
        disks = config.disks
        for disk in disks:
            if not disk.path.exists():
                raise DiskError(f"disk {disk.name}: there is no {disk.path}")
        if config.rootfs is not None:
            directory = scratch()
            progress(f"preparing {config.rootfs} as a disk")
            disks = (await rootfs_disk(config.rootfs, directory), *disks)
        return cls(qemu, image, disks, vsock)

    def qemu_config(
        self,
        config: VmConfig,
        accelerator: Accelerator,
        nics: tuple[Nic, ...],
        device: VsockDevice,
        shares: Shares,
    ) -> QemuConfig:
        """For one attempt, which has the `device`; starts the daemons of the `shares`.

        Raises:
            InvalidVmConfig, ShareError, LaunchError, ToolMissing: a directory cannot be shared.
        """
        words = [] if config.port == DEFAULT_PORT else [f"gcs.port={config.port}"]
        if config.shell:
            words.append("gcs.shell=on")
        return QemuConfig(
            qemu=self.qemu,
            accelerator=accelerator,
            memory_mib=config.memory_mib,
            cpus=config.cpus,
            kernel=self.image.kernel,
            initramfs=self.image.initramfs,
            vsock=self.vsock.kind,
            vsock_fd=device.fd,
            vsock_cid=device.cid,
            qmp_fd=-1,
            name=config.name,
            cmdline=(*words, *config.cmdline),
            disks=self.disks,
            nics=nics,
            shares=tuple((share, shares.serve(share)) for share in config.shares),
            qmp_path=config.qmp_path,
            max_cpus=config.max_cpus,
            max_memory_mib=config.max_memory_mib,
        )
