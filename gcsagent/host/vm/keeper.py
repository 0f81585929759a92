"""The process behind a named VM: launches it, owns it, and records its end. Run by `starter.py`.

It gets its orders as one JSON object on standard input and reports on standard output, one JSON object a
line: `{"claimed": pid}` once the VM's directory bears its name, `{"progress": text}` while booting, then
`{"ready": record}` or `{"error": {...}}`. After that nobody listens. SIGTERM means power down, and SIGUSR1
pull the plug.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gcsagent.host.errors import HostError
from gcsagent.host.forwards import Listening, Wanted, kept, listening
from gcsagent.host.vm import control, tools
from gcsagent.host.vm.config import VmConfig, VmExit
from gcsagent.host.vm.errors import BootError, LaunchError, VmError
from gcsagent.host.vm.launcher import VirtualMachine
from gcsagent.host.vm.named import PULL_PLUG, NamedVm, boot_id, read_record, remove, write_record
from gcsagent.host.vm.process import start_time
from gcsagent.host.vm.share import Share

# Whoever stops the VM decides how long to wait, and has the plug pulled then. This only bounds forgetting it.
_POWERDOWN_SECONDS = 300.0


class Keeper:
    """One named VM's life, in its directory."""

    def __init__(self, directory: Path, config: VmConfig) -> None:
        self._directory = directory
        self._config = replace(config, console_log=directory / "console.log", qmp_path=directory / "qmp")
        self._stop = asyncio.Event()
        self._pull_plug = asyncio.Event()
        self._forwards: tuple[str, ...] = ()

    def asked_to_stop(self) -> None:
        """A SIGTERM has come."""
        self._stop.set()

    def asked_to_pull_plug(self) -> None:
        """PULL_PLUG has come."""
        self._stop.set()
        self._pull_plug.set()

    async def run(self) -> int:
        """Keeps the VM until it ends; returns the process's exit status."""
        try:
            # Before the boot: a port that is taken is told at once.
            with listening([Wanted.parse(text) for text in self._config.forwards]) as sockets:
                vm = await self._launch()
                ended = None if vm is None else await self._keep(vm, sockets)
        except (VmError, HostError) as error:
            remove(self._directory)
            report({"error": describe(error)})
            return 1
        if ended is None:
            remove(self._directory)
            report({"error": describe(LaunchError("it was stopped before it was ready"))})
        else:
            self._record_end(ended)
        return 0

    async def _keep(self, vm: VirtualMachine, sockets: Sequence[Listening]) -> VmExit:
        async with (
            vm,
            control.listening(self._directory / control.CONTROL, orders(vm, self._recorded)),
            kept(vm.address, sockets) as self._forwards,
        ):
            report({"ready": self._record_running(vm).to_json()})
            vm.guest.on_vsock_changed = lambda: self._record_vsock(vm)
            detach()
            return await self._until_end(vm)

    async def _launch(self) -> VirtualMachine | None:
        def progress(text: str) -> None:
            report({"progress": text})

        launching = asyncio.create_task(VirtualMachine.launch(self._config, progress=progress))
        if await _first(launching, self._stop):
            return launching.result()
        launching.cancel()
        await asyncio.gather(launching, return_exceptions=True)
        return None

    async def _until_end(self, vm: VirtualMachine) -> VmExit:
        ending = asyncio.create_task(vm.wait())
        if await _first(ending, self._stop):
            return ending.result()
        down = asyncio.create_task(vm.powerdown(_POWERDOWN_SECONDS))
        if not await _first(down, self._pull_plug):
            down.cancel()
            await vm.kill()
        return await ending

    def _record_vsock(self, vm: VirtualMachine) -> None:
        # Its daemon is another process now. A record that is gone is not worth a replug.
        with suppress(VmError, OSError):
            self._record_running(vm)

    def _record_running(self, vm: VirtualMachine) -> NamedVm:
        record = replace(
            self._recorded(),
            state="running",
            qemu_pid=vm.pid,
            daemon_pid=vm.daemon_pid,
            address=vm.address,
            accel=str(vm.accel),
            vsock=str(vm.vsock),
            mac=vm.nics[0].mac if vm.nics else None,
            boot=tuple((moment.stage, round(moment.seconds, 3)) for moment in vm.timeline.moments()),
            forwards=self._forwards,
            memory_mib=vm.config.memory_mib,
            cpus=vm.config.cpus,
        )
        write_record(self._directory, record)
        return record

    def _record_end(self, ended: VmExit) -> None:
        record = read_record(self._directory)
        if ended.clean or self._stop.is_set() or record is None:
            remove(self._directory)
        else:
            write_record(self._directory, replace(record, state="crashed", reason=ended.reason))

    def _recorded(self) -> NamedVm:
        record = read_record(self._directory)
        if record is None:
            raise VmError(f"the record in {self._directory} is gone")
        return record


def orders(vm: VirtualMachine, recorded: Callable[[], NamedVm]) -> dict[str, control.Order]:
    """What the keeper does for whoever asks."""

    async def share_add(asked: dict[str, Any]) -> None:
        await vm.plug_share(Share(Path(asked["path"]), asked["tag"], asked["read_only"]))

    async def share_rm(asked: dict[str, Any]) -> None:
        await vm.unplug_share(asked["tag"], asked["timeout"])

    async def share_ls(asked: dict[str, Any]) -> list[dict[str, Any]]:
        return [asdict(share) for share in vm.shares()]

    async def replug(asked: dict[str, Any]) -> dict[str, Any]:
        await vm.replug_vsock(asked["timeout"])
        return recorded().to_json()

    async def snapshot_create(asked: dict[str, Any]) -> None:
        await vm.save(Path(asked["directory"]), hold=asked["hold"], progress=lambda text: None)

    return {
        "share-add": share_add,
        "share-rm": share_rm,
        "share-ls": share_ls,
        "replug": replug,
        "snapshot-create": snapshot_create,
    }


async def keep(told: dict[str, Any]) -> int:
    """Does what the starter has told it."""
    directory, config = Path(told["directory"]), VmConfig.from_json(told["config"])
    keeper = Keeper(directory, config)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, keeper.asked_to_stop)
    loop.add_signal_handler(PULL_PLUG, keeper.asked_to_pull_plug)
    claim(Path(told["fresh"]), directory, config)
    if not report({"claimed": os.getpid()}):
        # The starter died while it held the lock: nobody wants this VM.
        remove(directory)
        return 1
    return await keeper.run()


def claim(fresh: Path, directory: Path, config: VmConfig) -> None:
    """Writes the first record into the directory the starter made, and gives that its name."""
    started = start_time(os.getpid())
    assert started is not None
    record = NamedVm(
        name=config.name,
        state="starting",
        keeper_pid=os.getpid(),
        keeper_started=started,
        boot_id=boot_id(),
        created=time.time(),
        console=str(directory / "console.log"),
        qmp=str(directory / "qmp"),
        memory_mib=config.memory_mib,
        cpus=config.cpus,
    )
    write_record(fresh, record)
    os.rename(fresh, directory)


def describe(error: VmError | HostError) -> dict[str, Any]:
    """The error as the starter's report carries it."""
    common = {"type": type(error).__name__, "message": str(error)}
    if isinstance(error, BootError):
        details = {"stage": error.stage, "reason": error.reason, "lines": error.lines, "silent": error.silent}
        return {**common, **details}
    return common


def report(message: dict[str, Any]) -> bool:
    """Tells the starter; whether it still listens."""
    try:
        os.write(1, json.dumps(message).encode() + b"\n")
    except BrokenPipeError:
        return False
    return True


def detach() -> None:
    """Lets go of the starter's pipe: it reads to the end of file."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.close(null)


async def _first(task: asyncio.Task[Any], event: asyncio.Event) -> bool:
    """Whether the task is done before the event is set."""
    waiting = asyncio.create_task(event.wait())
    try:
        await asyncio.wait((task, waiting), return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
    return task.done()


def main() -> None:
    """Entry of the keeper process."""
    # Orphaned at once: nobody but PID 1 then has to reap the keeper of a VM that may run for months.
    if os.fork() != 0:
        os._exit(0)
    tools.make_environment_absolute()
    os.chdir("/")
    # The terminal may go away; Ctrl-C there is meant for others.
    for signum in (signal.SIGHUP, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)
    told = sys.stdin.buffer.read()
    if not told:
        # The starter died before it had any.
        sys.exit(1)
    sys.exit(asyncio.run(keep(json.loads(told))))
