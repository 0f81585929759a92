"""Named VMs: they survive the terminal that started them, and are found again by name.

Each has a process of its own, the keeper (`keeper.py`), in its own session; QEMU and the vsock daemon are
bound to that one, so that a VM and its keeper live and die together. What is known of a VM is in a
directory:

    STATE/vms/NAME/vm.json        the record below, replaced atomically
    STATE/vms/NAME/console.log    the guest's console, bounded (console.log.1: the part before)
    STATE/vms/NAME/qmp            QEMU's monitor, for people
    STATE/vms/NAME/control        where the keeper takes orders (`control.py`)
    STATE/vms/NAME/keeper.log     what the keeper had to say, normally nothing

STATE is $XDG_STATE_HOME/gcsctl; without that variable /run/gcsctl for root, since no VM outlives the
machine, and ~/.local/state/gcsctl for anybody else. A VM that ends in order takes its directory with it.
One that crashes leaves it, so that its console can be read; `stop` and the next `start` of the same name
remove it.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import tenacity

from gcsagent.host.vm.control import CONTROL
from gcsagent.host.vm.errors import InvalidVmConfig, VmError, VmExists, VmNotFound, VmNotRunning
from gcsagent.host.vm.places import state_dir
from gcsagent.host.vm.process import open_pidfd, start_time, wait_pidfd
from gcsagent.host.vm.rundir import scratch_parent, socket_parent, sweep

State = Literal["starting", "running", "crashed"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_RECORD = "vm.json"
_LOCK_SECONDS = 10.0

PULL_PLUG = signal.SIGUSR1
"""What a keeper ends its VM at once for. SIGTERM asks for the power button, however often it comes."""

# How long a keeper that was told to pull the plug may take for its last clean-up.
_KILL_SECONDS = 15.0

_NEW, _OLD = ".new-", ".old-"


@dataclass(frozen=True, slots=True)
class NamedVm:
    """What is recorded of one named VM.

    Attributes:
        keeper_pid, keeper_started, boot_id: pid and start time (clock ticks) of the keeper, and the host's
            boot; together they name a process that no later one can be mistaken for.
        qemu_pid, daemon_pid, address, accel, vsock: None until it runs; daemon_pid also without a daemon.
        created: seconds since the epoch.
        mac: of its network card, if it was started with one.
        forwards: where it is reached from here, and what there is reached, as `ADDR:PORT -> ID:PORT`.
        reason: why it crashed.
        boot: what its start reached, as pairs of a stage (`timeline.py`) and the seconds to it.
    """

    name: str
    state: State
    keeper_pid: int
    keeper_started: int
    boot_id: str
    created: float
    console: str
    qmp: str
    memory_mib: int
    cpus: int
    qemu_pid: int | None = None
    daemon_pid: int | None = None
    address: str | None = None
    accel: str | None = None
    vsock: str | None = None
    mac: str | None = None
    forwards: tuple[str, ...] = ()
    reason: str | None = None
    boot: Sequence[tuple[str, float]] = ()

    def to_json(self) -> dict[str, Any]:
        """As plain JSON data."""
        return asdict(self)


class VmStore:
    """The directory of named VMs."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root if root is not None else state_dir() / "vms"

    def directory(self, name: str) -> Path:
        """Where the VM `name` has its files.

        Raises:
            InvalidVmConfig: not a possible name.
        """
        if not _NAME.fullmatch(name):
            raise InvalidVmConfig(
                f"VM name {name!r} must be 1 to 63 letters, digits, '_', '.', '-', no sign first"
            )
        return self.root / name

    def get(self, name: str) -> NamedVm:
        """The VM's record, with the state it is really in.

        Raises:
            VmNotFound: there is none of that name.
        """
        vm = read_record(self.directory(name))
        if vm is None:
            raise VmNotFound(f"no VM named {name!r}; `gcsctl vm ls` lists them")
        return vm

    def list(self, damaged: Callable[[VmError], None] = lambda error: None) -> list[NamedVm]:
        """All named VMs, by name; `damaged` is told of each whose record cannot be read."""
        if not self.root.is_dir():
            return []
        found = []
        for path in sorted(self.root.iterdir()):
            if not _NAME.fullmatch(path.name):
                continue
            try:
                vm = read_record(path)
            except VmError as error:
                damaged(error)
            else:
                found += [] if vm is None else [vm]
        return found

    def address(self, name: str) -> str:
        """Where the agent of the running VM `name` is dialled.

        Raises:
            VmNotFound, VmNotRunning: there is nothing to dial.
        """
        address = self.running(name).address
        assert address is not None
        return address

    def running(self, name: str) -> NamedVm:
        """The record of the VM `name`, which runs.

        Raises:
            VmNotFound, VmNotRunning: there is none.
        """
        vm = self.get(name)
        if vm.state != "running" or vm.address is None:
            raise VmNotRunning(f"VM {name!r} is not running: {vm.reason or vm.state}")
        return vm

    def monitor(self, name: str) -> str:
        """Where the QEMU monitor of a VM listens.

        Raises:
            VmNotFound, VmNotRunning: there is none.
        """
        return self.running(name).qmp

    def control(self, name: str) -> Path:
        """Where the keeper of a VM takes orders; see `control.ask`.

        Raises:
            VmNotFound, VmNotRunning: there is none.
        """
        self.running(name)
        return self.directory(name) / CONTROL

    @asynccontextmanager
    async def locked(self) -> AsyncIterator[None]:
        """Holds off everybody else who wants to add or remove a VM.

        Raises:
            VmError: somebody has held the lock for 10 seconds, or the directory cannot be made.
        """
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(self.root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise VmError(f"cannot use the state directory {self.root}: {error.strerror}") from error
        try:
            await _take(lock, self.root)
            yield
        finally:
            os.close(lock)

    def claim(self, name: str) -> Path:
        """A new directory that is to become that of VM `name`, which may not exist. Call with the lock held.

        Raises:
            VmExists: it runs already, or is being started.
        """
        directory = self.directory(name)
        vm = read_record(directory)
        if vm is not None and vm.state != "crashed":
            raise VmExists(
                f"VM {name!r} is already {vm.state} (keeper process {vm.keeper_pid}); stop it first"
            )
        remove(directory)
        self._sweep()
        return Path(tempfile.mkdtemp(prefix=_NEW, dir=self.root))

    def _sweep(self) -> None:
        """What killed ones have left. With the lock held nobody makes a directory; removing is anybody's."""
        for path in self.root.iterdir():
            if path.name.startswith((_NEW, _OLD)):
                shutil.rmtree(path, ignore_errors=True)

    async def stop(self, name: str, timeout: float = 30.0) -> NamedVm:
        """Powers the VM down, kills it if it runs on for `timeout` seconds, and removes what is left.

        Raises:
            VmNotFound: there is none of that name.
            VmError: its keeper cannot be killed.
        """
        vm = self.get(name)
        pidfd = open_pidfd(vm.keeper_pid, vm.keeper_started) if vm.state != "crashed" else None
        if pidfd is not None:
            try:
                await _end_keeper(vm, pidfd, timeout)
            finally:
                os.close(pidfd)
        async with self.locked():
            left = read_record(self.directory(name))
            # Unless somebody has started it anew in the meantime.
            if left is not None and left.keeper_pid == vm.keeper_pid:
                remove(self.directory(name))
        for parent in (socket_parent(), scratch_parent()):
            sweep(parent)  # a keeper that was killed has left its sockets and copies of disks
        return vm


async def _end_keeper(vm: NamedVm, pidfd: int, timeout: float) -> None:
    """First the power button; then the plug; then the keeper itself, with which the kernel kills the rest."""
    for signum, patience in (
        (signal.SIGTERM, timeout),
        (PULL_PLUG, _KILL_SECONDS),
        (signal.SIGKILL, _KILL_SECONDS),
    ):
        try:
            signal.pidfd_send_signal(pidfd, signum)
        except ProcessLookupError:
            return
        if await wait_pidfd(pidfd, patience):
            return
    raise VmError(f"the keeper of VM {vm.name!r} (process {vm.keeper_pid}) does not die")


def boot_id() -> str:
    """Names this boot of the host (random(4))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def write_record(directory: Path, vm: NamedVm) -> None:
    """Replaces the record in one step: readers see the old one or the new one."""
    temporary = directory / f".{_RECORD}.new"
    temporary.write_text(json.dumps(vm.to_json(), indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, directory / _RECORD)


def read_record(directory: Path) -> NamedVm | None:
    """The record in a VM's directory, checked against reality; None if there is no VM in it."""
    try:
        data = json.loads((directory / _RECORD).read_text(encoding="utf-8"))
        known = {field.name for field in fields(NamedVm)}
        vm = NamedVm(**{key: value for key, value in data.items() if key in known})
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise VmError(f"{directory / _RECORD} is damaged ({error}); remove {directory}") from error
    if vm.state != "crashed" and not is_alive(vm):
        return replace(vm, state="crashed", reason="its keeper process was killed")
    return vm


def is_alive(vm: NamedVm) -> bool:
    """Whether the VM's keeper still runs."""
    return vm.boot_id == boot_id() and start_time(vm.keeper_pid) == vm.keeper_started


def remove(directory: Path) -> None:
    """Removes a VM's directory; under another name first, so that nobody meets half of one."""
    if not directory.is_dir():
        return
    trash = Path(tempfile.mkdtemp(prefix=_OLD, dir=directory.parent))
    with suppress(FileNotFoundError):  # somebody else was faster
        os.rename(directory, trash)
    shutil.rmtree(trash, ignore_errors=True)


async def _take(lock: int, root: Path) -> None:
    retrying = tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception_type(BlockingIOError),
        wait=tenacity.wait_exponential(multiplier=0.01, max=0.5),
        stop=tenacity.stop_after_delay(_LOCK_SECONDS),
        reraise=True,
    )
    try:
        await retrying(_flock, lock)
    except BlockingIOError:
        raise VmError(f"another gcsctl holds {root / '.lock'} for more than {_LOCK_SECONDS:g} s") from None


async def _flock(lock: int) -> None:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
