"""Launches a VM and sees it to its end. Nothing of it, process or file, is left behind.

    async with await VirtualMachine.launch(VmConfig(rootfs=Path("root"))) as vm:
        ...dial vm.address...
        await vm.powerdown()

The VM is bound to the process that launches it: if that dies, by SIGKILL even, the kernel kills QEMU and
the vsock daemon. `named.py` keeps VMs that outlive a terminal, with a process of its own that launches
them like this.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from gcsagent.host.snapshot import HOLD_SECONDS
from gcsagent.host.vm import accel, restoring, saving, tools, vsockdev
from gcsagent.host.vm.accel import AccelChoice
from gcsagent.host.vm.config import VmConfig, VmExit
from gcsagent.host.vm.console import ConsoleMonitor
from gcsagent.host.vm.consolelog import ConsoleLog
from gcsagent.host.vm.disk import Disk
from gcsagent.host.vm.errors import BootError, LaunchError, QmpClosed, QmpError, VmError
from gcsagent.host.vm.greeting import ANSWER_SECONDS, answered
from gcsagent.host.vm.guest import Guest
from gcsagent.host.vm.nic import Nic, new_mac
from gcsagent.host.vm.parts import Parts
from gcsagent.host.vm.plugging import Plugging
from gcsagent.host.vm.process import interrupts_held
from gcsagent.host.vm.qmp import QmpClient
from gcsagent.host.vm.rundir import PrivateDirectory, scratch_parent, socket_parent, sweep
from gcsagent.host.vm.shareplug import Shares
from gcsagent.host.vm.snapshotdir import Saved
from gcsagent.host.vm.timeline import Timeline
from gcsagent.host.vm.vsockdev import VsockChoice, VsockDevice

Progress = Callable[[str], None]

BOOT_SECONDS = {"kvm": 60.0, "tcg": 180.0}

# A KVM guest's kernel speaks within a second or two; one that says nothing for this long never will.
_KVM_SILENCE = 20.0

_PRESSES = 3


class VirtualMachine(Plugging):
    """A running VM. Made by `launch`; ended by `powerdown`, `kill`, or its guest.

    Attributes:
        accel: the accelerator it runs under, and why.
        vsock: the kind of vsock device it has, and why.
        nics: the network cards it was launched with.
        timeline: what its start reached when, up to the agent's first answer.
    """

    def __init__(self, config: VmConfig, progress: Progress | None = None) -> None:
        self.config = config
        self.accel = AccelChoice("tcg", "not chosen yet")
        self.vsock = VsockChoice("vhost-user-vsock", "not chosen yet")
        self.nics = _nics(config)
        self.timeline = Timeline()
        self._progress = progress or (lambda text: None)
        self._directories: list[PrivateDirectory] = []
        self._log: ConsoleLog | None = None
        self._guest: Guest | None = None
        self._parts: Parts | None = None

    @classmethod
    async def launch(cls, config: VmConfig, *, progress: Progress | None = None) -> VirtualMachine:
        """Boots a VM and returns once its agent has answered.

        Args:
            progress: told, one line at a time, what is chosen and how far the boot has come.

        Raises:
            InvalidVmConfig, ToolMissing, UnsuitableTool, DiskError: before anything is started.
            LaunchError: QEMU or the vsock daemon did not start.
            BootError: the guest did not become ready.
        """
        vm = cls(config, progress)
        try:
            await (vm._launch() if config.snapshot is None else vm._restore(config.snapshot))
        except BaseException:
            vm.destroy()
            raise
        return vm

    @property
    def address(self) -> str:
        """Where the agent is dialled: `vsock:CID:PORT` or `hvsock:PATH:PORT`."""
        return f"{self._running.device.address}:{self.config.port}"

    @property
    def console(self) -> ConsoleMonitor:
        """What the guest's console has shown so far."""
        return self._running.console

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        return self._running.pid

    @property
    def daemon_pid(self) -> int | None:
        """The process id of vhost-device-vsock, where it is used."""
        daemon = self._running.device.daemon
        return None if daemon is None else daemon.pid

    @property
    def monitor(self) -> QmpClient:
        """QEMU's monitor."""
        return self._running.qmp

    @property
    def guest(self) -> Guest:
        """The QEMU that runs it."""
        return self._running

    @property
    def booted_disks(self) -> tuple[Disk, ...]:
        """The disks it has had since its boot."""
        return () if self._parts is None else self._parts.disks

    @property
    def image_directory(self) -> Path:
        """Where its kernel and initramfs are."""
        assert self._parts is not None
        return self._parts.image.directory.resolve()

    def owns(self, path: Path) -> bool:
        """Whether a file goes when this VM goes."""
        return any(path.is_relative_to(directory.path) for directory in self._directories)

    def describe(self) -> str:
        """Accelerator and vsock device with the reasons for both, on one line."""
        return f"{self.accel}, {self.vsock}"

    async def wait(self) -> VmExit:
        """How the VM ended, once it has."""
        ended = await self._running.exited()
        self.destroy()
        return ended

    async def powerdown(self, timeout: float = 30.0) -> VmExit:
        """Presses the power button, then kills the VM if it still runs after `timeout` seconds."""
        # More than once, because a press that comes before the guest listens for it is lost.
        for _ in range(_PRESSES):
            await self._press_power_button()
            try:
                async with asyncio.timeout(timeout / _PRESSES):
                    return await self.wait()
            except TimeoutError:
                continue
        return await self.kill(f"did not power off within {timeout:g} s and was killed")

    async def replug_vsock(self, timeout: float = 60.0) -> None:
        """Unplugs the vsock device and plugs it again, with a fresh vhost-device-vsock where that is used.

        `address` stays. Every connection breaks, and nothing else in the guest notices. Returns once QEMU has
        the device; the guest takes a moment longer to find it, and who dials meanwhile must try again.

        Args:
            timeout: seconds the guest may take to let go of the device.

        Raises:
            ReplugError: it failed; the VM runs on, with or without its device, and this may be called again.
        """
        await self._running.replug_vsock(timeout)

    async def pause(self) -> None:
        """Stops the guest's CPUs and clocks between two instructions, until `resume`.

        Hosts should be quiet meanwhile: what one sends to a paused guest may break all connections (over
        vhost-device-vsock, which is replaced then as soon as the guest goes on).

        Raises:
            QmpError: QEMU did not do it.
        """
        await self.monitor.execute("stop")

    async def resume(self) -> None:
        """Lets a paused guest go on, its clock behind by the pause: `gcsagent.host.clock.sync` sets it.

        Raises:
            QmpError: QEMU did not do it.
        """
        await self.monitor.execute("cont")

    def standing_still(self, name: str, *, hold: float = HOLD_SECONDS) -> AbstractAsyncContextManager[None]:
        """For `async with`: in the block the guest is held for a snapshot called `name`, its file systems are
        frozen and its CPUs stopped; behind it all goes on, with the time and new random numbers.

        Args:
            hold: seconds it may take until the CPUs are stopped.

        Raises:
            SnapshotError: it takes longer, or the VM cannot go on.
            HostError, RpcError: the guest cannot be held.
            QmpError: QEMU did not stop it.
        """
        return saving.standing_still(self, name, hold)

    async def save(
        self, directory: Path, *, hold: float = HOLD_SECONDS, progress: Progress | None = None
    ) -> Saved:
        """Saves the running VM to a new directory, for `VmConfig.snapshot`, and lets it go on.

        Every connection to the guest breaks meanwhile. After an error the VM goes on as well, and nothing of
        the directory is there.

        Args:
            directory: its name is what the guest is told as well.
            hold: seconds it may take until the CPUs are stopped.

        Raises:
            SnapshotError: it cannot be held or saved, the directory not be written, or the VM not go on.
            ReplugError, QmpError, DiskError: unplugging, saving memory, copying disks failed.
        """
        return await saving.save(self, directory, hold=hold, progress=progress or self._progress)

    async def kill(self, why: str = "killed") -> VmExit:
        """Ends the VM at once, as pulling the plug does."""
        self._running.kill(why)
        return await self.wait()

    def destroy(self) -> None:
        """Kills the VM if it runs and removes all it used, without giving up control; may be called again."""
        with interrupts_held():
            if self._guest is not None:
                self._guest.destroy()
            if self._log is not None:
                self._log.close()
            for directory in self._directories:
                directory.remove()

    async def __aenter__(self) -> VirtualMachine:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.destroy()

    async def _press_power_button(self) -> None:
        try:
            await self._running.press_power_button()
        except QmpClosed:
            # QEMU is already on its way out.
            return
        except QmpError as error:
            self._running.kill(f"cannot be powered down: {error}")

    @property
    def _running(self) -> Guest:
        if self._guest is None:
            raise VmError("the VM has not been started")
        return self._guest

    async def _launch(self) -> None:
        sweep(socket_parent())
        sweep(scratch_parent())
        choice = accel.choose(self.config.accel)
        self.vsock = vsockdev.choose(self.config.vsock)
        parts = self._parts = await self._find_parts(choice)
        self.timeline.mark("parts")
        if self.config.console_log is not None:
            self._log = ConsoleLog(self.config.console_log)
        try:
            await self._boot(parts, choice)
        except (BootError, LaunchError) as error:
            if self._should_fall_back(choice):
                choice = AccelChoice("tcg", f"KVM guest died before its first output: {_reason(error)}")
                await asyncio.to_thread(tools.check_qemu, parts.qemu, "tcg")
            elif self._was_qemus_fault(choice):
                self._progress(f"{_reason(error)}; once more")
            else:
                raise
            await self._boot(parts, choice)

    async def _restore(self, directory: Path) -> None:
        sweep(socket_parent())
        sweep(scratch_parent())
        saved = Saved.load(directory)
        self.config = restoring.settled(self.config, saved)
        self.nics = _nics(self.config)
        self.accel = accel.choose(saved.accel)
        self.vsock = vsockdev.choose(self.config.vsock)
        self._progress(f"restoring {directory} under {self.describe()}")
        parts = await self._find_parts(self.accel)
        images = await restoring.disks(saved, directory, self._private(scratch_parent()))
        parts = self._parts = replace(parts, disks=restoring.booted(saved, images))
        if self.config.console_log is not None:
            self._log = ConsoleLog(self.config.console_log)
        self.timeline.mark("parts")
        plugged = restoring.plugged(saved, images)
        guest = await self._start(parts, machine=saved.machine, incoming=True, plugged=plugged)
        seconds = self.config.boot_timeout or BOOT_SECONDS[self.accel.name]
        await restoring.go_on(guest, saved, directory, self.address, seconds, self._progress)
        self.timeline.mark("restored")

    async def _find_parts(self, choice: AccelChoice) -> Parts:
        def scratch() -> Path:
            return self._private(scratch_parent())

        return await Parts.find(self.config, choice.name, self.vsock, scratch, self._progress)

    def _private(self, parent: Path) -> Path:
        directory = PrivateDirectory.create(parent)
        self._directories.append(directory)
        return directory.path

    async def _boot(self, parts: Parts, choice: AccelChoice) -> None:
        if self._guest is not None:
            self._guest.destroy()
        self.accel = choice
        self._progress(f"booting under {self.describe()}")
        self.timeline.again()
        guest = await self._start(parts)
        timeout = self.config.boot_timeout or BOOT_SECONDS[choice.name]
        silence = _KVM_SILENCE if choice.may_fall_back else None
        await guest.boot.finished(timeout, silence)
        await answered(guest, self.address, ANSWER_SECONDS[choice.name])
        self.timeline.mark("hello")

    async def _start(self, parts: Parts, **changes: Any) -> Guest:
        """Starts QEMU, with what `changes` make of its configuration."""
        directory = self._private(socket_parent())
        device, shares = await VsockDevice.create(parts.vsock, directory), Shares(directory)
        self.timeline.mark("vsock")
        try:
            config = replace(
                parts.qemu_config(self.config, self.accel.name, self.nics, device, shares), **changes
            )
        except BaseException:
            device.close()
            shares.close()
            raise
        self._guest = await Guest.start(config, device, shares, self._on_console, self._on_stage)
        self.timeline.mark("qemu")
        return self._guest

    def _on_stage(self, line: str, stages: Mapping[str, float]) -> None:
        self.timeline.guest(stages)
        self._progress(f"guest: {line}")

    def _on_console(self, data: bytes) -> None:
        if self._log is not None:
            self._log.write(data)

    def _should_fall_back(self, choice: AccelChoice) -> bool:
        return choice.may_fall_back and (self._guest is None or self._guest.console.bytes_seen == 0)

    def _was_qemus_fault(self, choice: AccelChoice) -> bool:
        """An assertion of its own, before any program ran in the guest that could have written to a disk.

        QEMU 10.0 under TCG, on a busy host while Linux probes its devices: iotlb_to_section.
        """
        guest = self._guest
        return choice.name == "tcg" and guest is not None and guest.aborted and not guest.console.stages


def _nics(config: VmConfig) -> tuple[Nic, ...]:
    return (Nic((config.mac or new_mac()).lower()),) if config.net == "user" else ()


def _reason(error: BootError | LaunchError) -> str:
    return error.reason if isinstance(error, BootError) else str(error)
