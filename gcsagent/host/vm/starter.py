"""Starts a named VM: its keeper process, then waits for the keeper's word on how the boot went."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from gcsagent.host.vm import errors
from gcsagent.host.vm.config import VmConfig
from gcsagent.host.vm.errors import BootError, LaunchError, VmError
from gcsagent.host.vm.launcher import Progress
from gcsagent.host.vm.named import NamedVm, VmStore, read_record, remove
from gcsagent.host.vm.process import Child, open_pidfd, start_time, wait_pidfd

_PACKAGE_ROOT = Path(errors.__file__).resolve().parents[3]
_PROGRAM = "import sys; sys.path.insert(0, sys.argv[1]); from gcsagent.host.vm.keeper import main; main()"

# The launcher in the keeper has deadlines of its own; these are for a keeper that hangs.
_KEEPER_SECONDS = {"claimed": 60.0, "ready": 3600.0}

# A keeper that is told to give up needs no longer than this for killing QEMU and removing files.
_GIVE_UP_SECONDS = 15.0

_MAX_REPORT_BYTES = 1 << 20

# What a keeper's report may name; BootError carries more than a message and is made apart.
_ERRORS = {
    kind.__name__: kind
    for kind in (
        errors.InvalidVmConfig,
        errors.ToolMissing,
        errors.UnsuitableTool,
        errors.DiskError,
        errors.ShareError,
        errors.SnapshotError,
        errors.LaunchError,
        errors.QmpError,
    )
}


async def start(store: VmStore, name: str, config: VmConfig, *, progress: Progress) -> NamedVm:
    """Boots a VM that outlives this process; returns once it is ready. After a failure nothing remains.

    Raises:
        VmExists: it runs already.
        VmError: whatever `VirtualMachine.launch` raises, or the keeper died.
    """
    config = _absolute(replace(config, name=name))
    directory = store.directory(name)
    async with store.locked():
        keeper = await _claim(store, directory, config)
    try:
        return NamedVm(**await _hear(keeper, "ready", directory, progress))
    except BaseException:
        await _give_up(directory, keeper.pid)
        # Its directory may have been removed before it, and its QEMU, were gone.
        await keeper.ended()
        raise
    finally:
        keeper.close()


async def _claim(store: VmStore, directory: Path, config: VmConfig) -> _Keeper:
    """Starts the keeper and has it take the name. The lock is held, so what bears it then is ours."""
    fresh = store.claim(config.name)
    try:
        keeper = _Keeper(fresh / "keeper.log")
        try:
            await keeper.order({"directory": str(directory), "fresh": str(fresh), "config": config.to_json()})
            keeper.claimed_by(await _hear(keeper, "claimed", fresh, lambda text: None))
        except BaseException:
            # Closed first: a keeper that comes too late to report its claim drops it.
            keeper.close()
            await _give_up(directory, None)
            raise
    finally:
        remove(fresh)
    return keeper


class _Keeper:
    """The keeper process as its starter sees it: orders in, reports out."""

    def __init__(self, log: Path) -> None:
        self._orders, self._write_end = os.pipe2(os.O_CLOEXEC)
        self._read_end, reports = os.pipe2(os.O_CLOEXEC)
        self._reader = asyncio.StreamReader(limit=_MAX_REPORT_BYTES)
        self._transport: asyncio.ReadTransport | None = None
        self.pid: int | None = None
        self._pidfd: int | None = None
        try:
            with log.open("wb") as errors_to:
                self._child = Child.spawn(
                    "the VM's keeper",
                    # Isolated from the current directory, and finding this very package wherever it is.
                    [sys.executable, "-P", "-c", _PROGRAM, str(_PACKAGE_ROOT)],
                    stdin=self._orders,
                    stdout=reports,
                    stderr=errors_to.fileno(),
                )
        except BaseException:
            os.close(self._write_end)
            os.close(self._read_end)
            raise
        finally:
            os.close(self._orders)
            os.close(reports)

    async def order(self, orders: dict[str, Any]) -> None:
        """Tells it what to do, once and for all."""
        loop = asyncio.get_running_loop()
        pipe = os.fdopen(self._read_end, "rb", buffering=0)
        self._read_end = -1
        self._transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(self._reader), pipe
        )
        with os.fdopen(self._write_end, "wb") as file:
            self._write_end = -1
            file.write(json.dumps(orders).encode())
        await self._child.wait()

    def claimed_by(self, pid: int) -> None:
        """The keeper, orphaned by now, has told its process id."""
        self.pid = pid
        started = start_time(pid)
        self._pidfd = None if started is None else open_pidfd(pid, started)

    async def ended(self) -> None:
        """Returns once it has exited, or after a while if it will not."""
        if self._pidfd is not None:
            await wait_pidfd(self._pidfd, _GIVE_UP_SECONDS)

    async def report(self) -> dict[str, Any] | None:
        """Its next report; None if it has died."""
        line = await self._reader.readline()
        return json.loads(line) if line else None

    def close(self) -> None:
        """Stops listening; the keeper lives on."""
        self._child.destroy()
        if self._transport is not None:
            self._transport.close()
        for fd in (self._write_end, self._read_end, self._pidfd):
            if fd is not None and fd >= 0:
                os.close(fd)


def _absolute(config: VmConfig) -> VmConfig:
    return replace(
        config,
        image=None if config.image is None else config.image.absolute(),
        kernel=None if config.kernel is None else config.kernel.absolute(),
        rootfs=None if config.rootfs is None else config.rootfs.absolute(),
        disks=tuple(replace(disk, path=disk.path.absolute()) for disk in config.disks),
        forwards=tuple(_absolute_forward(text) for text in config.forwards),
        shares=tuple(replace(share, path=share.path.absolute()) for share in config.shares),
    )


def _absolute_forward(text: str) -> str:
    return str(Path(text).absolute()) if text.startswith(".") else text


async def _hear(keeper: _Keeper, awaited: str, directory: Path, progress: Progress) -> Any:
    async with asyncio.timeout(_KEEPER_SECONDS[awaited]):
        while (report := await keeper.report()) is not None:
            if "progress" in report:
                progress(report["progress"])
            elif "error" in report:
                raise _error(report["error"])
            elif awaited in report:
                return report[awaited]
    raise LaunchError(f"the VM's keeper process died: {_last_words(directory)}")


def _error(report: dict[str, Any]) -> VmError:
    if report["type"] == "BootError":
        return BootError(report["stage"], report["reason"], tuple(report["lines"]), silent=report["silent"])
    return _ERRORS.get(report["type"], VmError)(report["message"])


def _last_words(directory: Path) -> str:
    try:
        lines = (directory / "keeper.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return lines[-1] if lines else "it left no message"


async def _give_up(directory: Path, keeper_pid: int | None) -> None:
    """Ends the keeper (None: whichever there is), which cleans up; what it could not, is removed here."""
    vm = _record_of(directory, keeper_pid)
    pidfd = None if vm is None else open_pidfd(vm.keeper_pid, vm.keeper_started)
    if pidfd is not None:
        await _end(pidfd)
    if _record_of(directory, keeper_pid) is not None:
        remove(directory)


def _record_of(directory: Path, keeper_pid: int | None) -> NamedVm | None:
    vm = read_record(directory)
    return vm if vm is not None and keeper_pid in (None, vm.keeper_pid) else None


async def _end(pidfd: int) -> None:
    try:
        for signum in (signal.SIGTERM, signal.SIGKILL):
            signal.pidfd_send_signal(pidfd, signum)
            if await wait_pidfd(pidfd, _GIVE_UP_SECONDS):
                return
    except ProcessLookupError:
        return
    finally:
        os.close(pidfd)
