"""One running QEMU: its process, vsock device, shares, console and monitor, watched until it ends.

Three things can end a guest: QEMU exits; the vsock daemon, or a share's, dies (the guest is then out of
reach, or waits for ever, since QEMU's devices do not reconnect) other than by a replug; or the virtual
machine stops inside a living QEMU (a KVM internal error). All three lead to one `VmExit`, made after the
console and the monitor have been read to their ends.
"""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

from gcsagent.host.vm.config import VmExit
from gcsagent.host.vm.console import ConsoleMonitor, sanitize
from gcsagent.host.vm.diagnosis import Circumstances, evidence, explain
from gcsagent.host.vm.errors import BootError, LaunchError, QmpError
from gcsagent.host.vm.hotplug import HotPlug
from gcsagent.host.vm.migration import Migration
from gcsagent.host.vm.process import Child, PipeReader, Tail
from gcsagent.host.vm.qemu import QemuConfig, qemu_argv
from gcsagent.host.vm.qmp import QmpClient, QmpEvent
from gcsagent.host.vm.shareplug import Shares
from gcsagent.host.vm.vsockdev import VsockDevice
from gcsagent.host.vm.vsockplug import VsockPlug

# What may still be in flight once QEMU is gone or the guest has said its last: pipe contents, a panic's
# trace.
_DRAIN_SECONDS = 2.0

# What QEMU may take to exit once one of its daemons has.
_EXIT_SECONDS = 2.0

# The kernel says nothing by itself before it starts init, unless something is wrong.
_SILENCE_HINT = "; --append earlyprintk=ttyS0 shows how far the kernel comes"

# QEMU's RunState values (qapi/run-state.json) that no guest comes back from by itself.
_DEAD_STATES = ("internal-error", "io-error", "guest-panicked")

# QEMU's ShutdownCause values that mean the guest ended itself in order.
_ORDERLY = {"guest-shutdown": "the guest powered off", "guest-reset": "the guest rebooted, which ends a VM"}

OnStage = Callable[[str, Mapping[str, float]], None]


class Guest:
    """One attempt at running a guest. `start`, then `booted`, then `exited`; `destroy` at any time."""

    def __init__(
        self,
        device: VsockDevice,
        shares: Shares,
        circumstances: Circumstances,
        on_console: Callable[[bytes], None],
        on_stage: OnStage,
    ) -> None:
        self.device = device
        self.shares = shares
        self.shares.on_lost = self._on_lost_share
        self._circumstances = circumstances
        self.console = ConsoleMonitor(self._on_line)
        self._on_console = on_console
        self._on_stage = on_stage
        self._loop = asyncio.get_running_loop()
        self._boot: asyncio.Future[None] = self._loop.create_future()
        self._exit: asyncio.Future[VmExit] = self._loop.create_future()
        self._complaints = Tail()
        self._console_pipe = PipeReader(self._on_console_bytes)
        self._stderr = PipeReader(self._complaints.feed)
        self._qemu: Child | None = None
        self._qmp: QmpClient | None = None
        self._plug: VsockPlug | None = None
        self._ports: HotPlug | None = None
        self._migration: Migration | None = None
        self._replugging = asyncio.Lock()
        self._daemon_watch: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._shutdown = ""
        self._blame = ""
        self._failing = False

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

    async def booted(self, timeout: float, silence: float | None) -> None:
        """Returns when the guest is ready.

        Args:
            timeout: seconds until it must be ready.
            silence: seconds until it must have written something to its console, if that matters.

        Raises:
            BootError: it failed, died, or took too long.
        """
        if silence is not None:
            self._loop.call_later(silence, self._fail_if_silent, silence)
        try:
            async with asyncio.timeout(timeout):
                await asyncio.shield(self._boot)
        except TimeoutError:
            hint = "" if self.console.bytes_seen else _SILENCE_HINT
            raise self.boot_error(f"not ready within {timeout:g} s{hint}") from None

    def boot_error(self, reason: str, *, explained: bool = False) -> BootError:
        """The error for a guest that did not come up, noticed by ``reason``.

        Args:
            explained: `reason` says it all; what the console shows is not looked for another.
        """
        console = self.console
        if not explained:
            reason = explain(console, reason, self._circumstances)
        silent = console.bytes_seen == 0
        return BootError(console.last_stage, sanitize(reason), evidence(console), silent=silent)

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
            self._unwatch_daemon()
            try:
                yield self._plug
            finally:
                if self._plug.plugged:
                    self._watch_daemon()

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
            self._boot.set_result(None)  # it was booted by another QEMU
        else:
            self.device.handed_over()
            self.device.publish()
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
        self._unwatch_daemon()
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
            self._daemon_watch = self._run(self._kill_without(self.device.daemon))

    def _unwatch_daemon(self) -> None:
        if self._daemon_watch is not None:
            self._daemon_watch.cancel()

    async def _kill_without(self, daemon: Child) -> None:
        status = await daemon.wait()
        await self._end_without(status, f"vhost-device-vsock exited {status}: {self.device.complaints()}")

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
        ended = self._exit.result()
        if not self._boot.done():
            self._boot.set_exception(self.boot_error(ended.reason))
            # Nobody may be waiting for the boot; the exit record says it all.
            self._boot.exception()

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

    def _on_line(self, line: str) -> None:
        if self._boot.done():
            return
        if self.console.ready:
            self._boot.set_result(None)
        elif self.console.failure is not None:
            failure = self.console.failure
            self._fail_soon(f"stage '{failure.stage}' failed: {failure.reason}")
        elif self.console.panic is not None:
            self._fail_soon(self.console.panic.message)
        if "gcs-boot: " in line:
            self._on_stage(line.partition("gcs-boot: ")[2], self.console.stages)

    def _fail_soon(self, reason: str) -> None:
        # What follows explains it (a trace, the power-off); QEMU's exit cuts this short.
        if not self._failing:
            self._failing = True
            self._loop.call_later(_DRAIN_SECONDS, self._fail, reason)

    def _fail_if_silent(self, seconds: float) -> None:
        if self.console.bytes_seen == 0:
            self._fail(f"no output at all within {seconds:g} s")

    def _fail(self, reason: str) -> None:
        if not self._boot.done():
            self._boot.set_exception(self.boot_error(reason))
            self._boot.exception()

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
            self._run(self._ask_why_stopped())

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


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
