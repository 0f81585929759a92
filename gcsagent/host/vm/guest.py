"""One running QEMU: its process, vsock device, shares, console and monitor, watched until it ends.

Three things can end a guest: QEMU exits; the vsock daemon, or a share's, dies (the guest is then out of
reach, or waits for ever, since QEMU's devices do not reconnect) other than by a replug; or the virtual
machine stops inside a living QEMU (a KVM internal error). All three lead to one `VmExit`, made after the
console and the monitor have been read to their ends.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

from gcsagent.host.vm.booting import Boot, OnStage
from gcsagent.host.vm.config import VmExit
from gcsagent.host.vm.console import sanitize
from gcsagent.host.vm.diagnosis import Circumstances
from gcsagent.host.vm.errors import LaunchError, QmpError, ReplugError
from gcsagent.host.vm.hotplug import HotPlug
from gcsagent.host.vm.migration import Migration
from gcsagent.host.vm.process import Child, PipeReader, Tail
from gcsagent.host.vm.qemu import QemuConfig, qemu_argv
from gcsagent.host.vm.qmp import QmpClient, QmpEvent
from gcsagent.host.vm.shareplug import Shares
from gcsagent.host.vm.vsockdev import VsockDevice
from gcsagent.host.vm.vsockplug import VsockPlug

# What may still be in flight once QEMU is gone: what its pipes hold, its last events.
_DRAIN_SECONDS = 2.0

# What QEMU may take to exit once one of its daemons has.
_EXIT_SECONDS = 2.0

# A vsock daemon that has gone deaf is replaced, this often at most; the guest may take this long to let go of
# its device.
_MEND_SECONDS, _MEND_UNPLUG_SECONDS = 1.0, 60.0

# What a daemon that ends may take between its first thread's end and its own.
_AFTER_SECONDS = 0.2

# QEMU's RunState values (qapi/run-state.json) that no guest comes back from by itself.
_DEAD_STATES = ("internal-error", "io-error", "guest-panicked")

# QEMU's ShutdownCause values that mean the guest ended itself in order.
_ORDERLY = {"guest-shutdown": "the guest powered off", "guest-reset": "the guest rebooted, which ends a VM"}

_logger = logging.getLogger(__name__)


class Guest:
    """One attempt at running a guest. `start`, then `boot.finished`, then `exited`; `destroy` at any time.

    Attributes:
        on_vsock_changed: told whenever the vsock device has been unplugged or plugged in since the start.
    """

    def __init__(
        self,
        device: VsockDevice,
        shares: Shares,
        circumstances: Circumstances,
        on_console: Callable[[bytes], None],
        on_stage: OnStage,
    ) -> None:
        self.device = device
        self.device.on_deaf = self._on_deaf_daemon
        self.on_vsock_changed: Callable[[], None] = lambda: None
        self.shares = shares
        self.shares.on_lost = self._on_lost_share
        self.boot = Boot(circumstances, on_stage)
        self.console = self.boot.console
        self._on_console = on_console
        self._exit: asyncio.Future[VmExit] = asyncio.get_running_loop().create_future()
        self._complaints = Tail()
        self._console_pipe = PipeReader(self._on_console_bytes)
        self._stderr = PipeReader(self._complaints.feed)
        self._qemu: Child | None = None
        self._qmp: QmpClient | None = None
        self._plug: VsockPlug | None = None
        self._ports: HotPlug | None = None
        self._migration: Migration | None = None
        self._replugging = asyncio.Lock()
        self._mended = -_MEND_SECONDS
        self._going = asyncio.Event()
        self._going.set()
        self._vsock_tasks: list[asyncio.Task[None]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._shutdown = ""
        self._blame = ""

    @classmethod
    async def start(
        cls,
        config: QemuConfig,
        device: VsockDevice,
        shares: Shares,
        on_console: Callable[[bytes], None],
        on_stage: OnStage,
    ) -> Guest:
        """Starts QEMU as `config` describes it, with `device` for its vsock and `shares`: it owns both then.

        Args:
            on_console: gets the console's raw bytes.
            on_stage: told what the guest reports of its boot, and the stages until then.

        Raises:
            LaunchError: QEMU did not start.
        """
        circumstances = Circumstances(config.memory_mib, config.initramfs)
        guest = cls(device, shares, circumstances, on_console, on_stage)
        try:
            await guest._start(config)
        except BaseException:
            guest.destroy()
            raise
        return guest

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        assert self._qemu is not None
        return self._qemu.pid

    @property
    def aborted(self) -> bool:
        """QEMU has ended by an assertion of its own."""
        return self._qemu is not None and self._qemu.returncode == -signal.SIGABRT

    async def exited(self) -> VmExit:
        """How the guest ended, once it has. Any number of tasks may wait."""
        return await asyncio.shield(self._exit)

    async def press_power_button(self) -> None:
        """Asks the guest to power off, by ACPI.

        Raises:
            QmpError: QEMU cannot be asked any more.
        """
        await self.qmp.execute("system_powerdown")

    @property
    def qmp(self) -> QmpClient:
        """The monitor of QEMU."""
        assert self._qmp is not None
        return self._qmp

    async def replug_vsock(self, timeout: float) -> None:
        """Unplugs the vsock device and plugs it again, with a fresh daemon; one call after the other.

        Args:
            timeout: seconds the guest may take to let go of the device.

        Raises:
            ReplugError: it failed; the guest runs on, with or without its device.
        """
        async with self._changing_vsock() as plug:
            await plug.replug(timeout)

    async def unplug_vsock(self, timeout: float) -> None:
        """Takes the vsock device away; hosts wait at its address until `plug_vsock`. Raises ReplugError."""
        async with self._changing_vsock() as plug:
            await plug.unplug(timeout)

    async def plug_vsock(self) -> None:
        """Plugs it in again, or for the first time, unless it is there. Raises ReplugError."""
        async with self._changing_vsock() as plug:
            if not plug.plugged:
                await plug.plug()

    @asynccontextmanager
    async def _changing_vsock(self) -> AsyncIterator[VsockPlug]:
        assert self._plug is not None
        async with self._replugging:
            self._leave_vsock()
            try:
                yield self._plug
            finally:
                if self._plug.plugged:
                    self._watch_daemon()
                    self._publish(self._plug)
                self.on_vsock_changed()

    async def why(self, reason: str) -> str:
        """`reason`, and how QEMU ended if that is behind it."""
        if self._qmp is not None and self._qmp.closed:
            with suppress(TimeoutError):
                async with asyncio.timeout(_DRAIN_SECONDS):
                    return f"{reason}: {(await self.exited()).reason}"
        return reason

    @property
    def migration(self) -> Migration:
        """What saves its memory to a file, and loads it."""
        assert self._migration is not None
        return self._migration

    @property
    def ports(self) -> HotPlug:
        """Where devices are plugged into it."""
        assert self._ports is not None
        return self._ports

    def kill(self, why: str) -> None:
        """Ends QEMU at once; `exited` then gives `why` as the reason."""
        self._blame = self._blame or why
        if self._qemu is not None:
            self._qemu.signal(signal.SIGKILL)

    def destroy(self) -> None:
        """Kills and frees everything without giving up control; may be called again."""
        self._blame = self._blame or "destroyed"
        for task in self._tasks:
            task.cancel()
        if self._qmp is not None:
            self._qmp.close()
        if self._qemu is not None:
            self._qemu.destroy()
        self._console_pipe.close()
        self._stderr.close()
        self.device.close()
        self.shares.close()
        self._conclude()

    async def _start(self, config: QemuConfig) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours.setblocking(False)
        try:
            config = replace(config, qmp_fd=theirs.fileno())
            self._qemu = Child.spawn(
                "QEMU",
                qemu_argv(config),
                pass_fds=(
                    config.qmp_fd,
                    *([] if config.incoming else [config.vsock_fd]),
                    *(fd for _, fd in config.shares),
                ),
                stdout=self._console_pipe.write_end,
                stderr=self._stderr.write_end,
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._console_pipe.close_write_end()
        self._stderr.close_write_end()
        if config.incoming:
            self.boot.happened_elsewhere()
        else:
            self.device.handed_over()
            self.shares.handed_over()
            self._watch_daemon()
        self._run(self._watch(self._qemu))
        try:
            self._qmp = await QmpClient.open(ours, self._on_event)
            self._plug = VsockPlug(self._qmp, self.device, plugged=not config.incoming)
            self._ports, self._migration = HotPlug(self._qmp), Migration(self._qmp)
        except QmpError as error:
            ours.close()
            raise LaunchError(f"QEMU did not start: {await self._why_no_monitor(error)}") from error
        if not config.incoming:
            self._publish(self._plug)

    async def _why_no_monitor(self, error: QmpError) -> str:
        # A QEMU that dislikes its command line closes the monitor, then exits: its own words are the
        # better reason.
        try:
            async with asyncio.timeout(_DRAIN_SECONDS):
                return (await self.exited()).reason
        except TimeoutError:
            self.kill(str(error))
            return (await self.exited()).reason

    async def _watch(self, qemu: Child) -> None:
        await qemu.wait()
        self._leave_vsock()
        await asyncio.gather(
            self._console_pipe.drained(_DRAIN_SECONDS),
            self._stderr.drained(_DRAIN_SECONDS),
            *([self._qmp.finished(_DRAIN_SECONDS)] if self._qmp is not None else []),
            # One that ended first, and had QEMU end, is the reason.
            self.shares.ended(_DRAIN_SECONDS),
        )
        self._console_pipe.close()
        self._stderr.close()
        self.device.close()
        self.shares.close()
        self._conclude()

    def _watch_daemon(self) -> None:
        if self.device.daemon is not None:
            self._vsock_tasks.append(self._run(self._kill_without(self.device.daemon)))

    def _publish(self, plug: VsockPlug) -> None:
        self._vsock_tasks.append(self._run(plug.publish()))

    def _leave_vsock(self) -> None:
        for task in self._vsock_tasks:
            task.cancel()
        self._vsock_tasks.clear()

    async def _kill_without(self, daemon: Child) -> None:
        status = await daemon.wait()
        await self._end_without(status, f"vhost-device-vsock exited {status}: {self.device.complaints()}")

    def _on_deaf_daemon(self) -> None:
        self._run(self._mend_vsock())

    async def _mend_vsock(self) -> None:
        """Gives the guest a fresh daemon for one that serves nobody any more."""
        daemon, complaint = self.device.daemon, self.device.complaints()
        if daemon is None or await _ends(daemon):
            return  # that ends the VM
        # A guest that stands still does not let go of its device.
        await self._going.wait()
        loop = asyncio.get_running_loop()
        await asyncio.sleep(self._mended + _MEND_SECONDS - loop.time())
        self._mended = loop.time()
        try:
            async with self._changing_vsock() as plug:
                # Else it was replugged meanwhile, or is unplugged for a snapshot.
                if plug.plugged and self.device.daemon is daemon:
                    why = sanitize(complaint)
                    _logger.warning("vhost-device-vsock serves nobody any more (%s) and is replaced", why)
                    await plug.replug(_MEND_UNPLUG_SECONDS)
        except ReplugError as error:
            _logger.error("the guest is out of reach: %s", sanitize(str(error)))

    def _on_lost_share(self, status: int, how: str) -> None:
        self._run(self._end_without(status, how))

    async def _end_without(self, status: int, how: str) -> None:
        """A daemon has exited: QEMU is killed for it, unless it is ending by itself."""
        assert self._qemu is not None
        if status:
            self._blame = self._blame or how
        try:
            # One that ends lets go of its daemons first, and its exit may be seen after theirs.
            async with asyncio.timeout(_EXIT_SECONDS):
                await self._qemu.wait()
        except TimeoutError:
            self.kill(how)

    def _conclude(self) -> None:
        if self._plug is not None:
            self._plug.abandon()
        if self._ports is not None:
            self._ports.abandon()
        if self._migration is not None:
            self._migration.abandon()
        self.console.end()
        if not self._exit.done():
            self._exit.set_result(self._make_exit())
        self.boot.fail(self._exit.result().reason)

    def _make_exit(self) -> VmExit:
        status = -1 if self._qemu is None or self._qemu.returncode is None else self._qemu.returncode
        clean, reason = self._verdict(status)
        return VmExit(clean, sanitize(reason), status, tuple(self.console.findings))

    def _verdict(self, status: int) -> tuple[bool, str]:
        panic = self.console.panic
        if panic is not None or self._shutdown == "guest-panic":
            return False, panic.message if panic is not None else "the guest's kernel panicked"
        if status == 0 and self._shutdown in _ORDERLY:
            return True, _ORDERLY[self._shutdown]
        if self._blame:
            return False, self._blame
        detail = self._complaints.last_line() or self._shutdown or "no output"
        how = f"was killed by {_signal_name(-status)}" if status < 0 else f"exited {status}"
        if status == -signal.SIGKILL:
            detail = "by somebody, or by this host for want of memory: its kernel log says so"
        return False, f"QEMU {how}: {detail}"

    def _on_console_bytes(self, data: bytes) -> None:
        self._on_console(data)
        self.console.feed(data)

    def _on_event(self, event: QmpEvent) -> None:
        if self._plug is not None:
            self._plug.on_event(event)
        if self._ports is not None:
            self._ports.on_event(event)
        if self._migration is not None:
            self._migration.on_event(event)
        if event.name == "SHUTDOWN":
            self._shutdown = str(event.data.get("reason", ""))
        elif event.name == "STOP":
            self._going.clear()
            self._run(self._ask_why_stopped())
        elif event.name == "RESUME":
            self._going.set()
            self.device.check()

    async def _ask_why_stopped(self) -> None:
        assert self._qmp is not None
        try:
            answer = await self._qmp.execute("query-status")
        except QmpError:
            # QEMU is on its way out: _watch sees to it.
            return
        state = str(answer.get("status")) if isinstance(answer, dict) else ""
        if state in _DEAD_STATES:
            said = self._complaints.text().strip().splitlines()
            detail = f": {said[0]}" if said else ""
            self.kill(f"the virtual machine stopped ({state}){detail}")

    def _run(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def _ends(daemon: Child) -> bool:
    with suppress(TimeoutError):
        async with asyncio.timeout(_AFTER_SECONDS):
            await daemon.wait()
    return daemon.returncode is not None


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
