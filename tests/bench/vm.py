"""The VM tier's world: a guest of this tree's image, a container to exec in, one that sees all of the guest.

The second is how baselines get to run in the guest: it shares every namespace but that of mounts, and has
the guest's root directory, to which its programs change.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gcsagent.host.client import Client
from gcsagent.host.copy import Manner, upload
from gcsagent.host.process import RemoteProcess
from gcsagent.host.spec import ALL_CAPABILITIES, exec_spec
from gcsagent.host.vm.config import VmConfig
from gcsagent.host.vm.launcher import VirtualMachine
from gcsagent.host.vm.tools import cache_dir
from protocol.families.process import Exec
from tests.bench.host import BOX, compile_program
from tests.cases.machines import PACE, build_image
from tests.cases.target import PIPES, Target, connect, creation, executing, expect, remove

ROOTFS = "/run/gcs/disks/rootfs"
GUEST, SEEN = "guest", "/mnt"
SHARED = "/run/bench"
RUNC = ("runc", "--root", "/run/gcs/state/runtime/runc")
BOOT_SECONDS, END_SECONDS = 300.0, 90.0
PORT = 7000


@dataclass(slots=True)
class Vm:
    """``driver`` is there once something has been timed in the guest: idle means without it."""

    machine: VirtualMachine
    target: Target
    client: Client
    image: Path
    driver: RemoteProcess | None = None

    @property
    def plain_address(self) -> str:
        """Where ``bytes serve`` is dialled: as the agent is, but for the port."""
        return f"{self.machine.address.rpartition(':')[0]}:{PORT}"

    async def timed(self, command: str, **arguments: Any) -> float:
        """Seconds, as :mod:`tests.bench.guest_driver` has measured them. Raises RuntimeError."""
        if self.driver is None:
            spec = exec_spec(args=("chroot", SEEN, "python3", "-P", f"{SHARED}/guest_driver.py"))
            self.driver = await RemoteProcess.exec(self.client, Exec(GUEST, "driver", spec, PIPES))
        line = json.dumps({"command": command, **arguments}) + "\n"
        await self.driver.streams["stdin"].write(line.encode())
        answer = json.loads(await expect(self.driver.streams["stdout"], rb"[^\n]*\n"))
        if "error" in answer:
            raise RuntimeError(f"in the guest: {answer['error']}")
        return float(answer["seconds"])

    async def output(self, *args: str) -> str:
        """What a program of the guest prints. Raises RuntimeError when it fails."""
        async with executing(self.client, GUEST, "chroot", SEEN, *args) as process:
            done = await process.communicate()
        if done.exit.exit_code:
            raise RuntimeError(f"{args[0]} in the guest: {done.stderr.decode(errors='replace')[-400:]}")
        return done.stdout.decode()


@contextlib.asynccontextmanager
async def world(directory: Path) -> AsyncIterator[Vm]:
    """Boots it, and powers it off in the end."""
    shared = directory / "shared"
    shared.mkdir()
    compile_program(shared)
    shutil.copy(Path(__file__).with_name("guest_driver.py"), shared)
    image = await asyncio.to_thread(build_image)
    rootfs = (cache_dir() / "demo-rootfs" / "current" / "rootfs.erofs").resolve(strict=True)
    config = VmConfig(name="bench", image=image, rootfs=rootfs, console_log=directory / "console")
    async with asyncio.timeout(BOOT_SECONDS):
        machine = await VirtualMachine.launch(config)
    try:
        pace = PACE[machine.accel.name]
        target = Target(machine.address, ROOTFS, box=BOX, pace=pace, execs=1)
        async with await connect(target) as client:
            await _furnish(target, client, shared)
            vm = Vm(machine, target, client, image)
            yield vm
            if vm.driver is not None:
                vm.driver.detach()
            for container in (BOX, GUEST):
                await remove(client, container)
            async with asyncio.timeout(END_SECONDS):
                await client.shutdown()
                await machine.wait()
    finally:
        machine.destroy()


async def _furnish(target: Target, client: Client, shared: Path) -> None:
    await upload(client, str(shared), None, SHARED, Manner())
    box = creation(target, BOX, ("sleep", "100000"), spec=_bench_mount, allow_vsock=True)
    guest = creation(target, GUEST, ("sleep", "100000"), spec=_everything, allow_vsock=True)
    for params in (box, guest):
        await client.create_container(params)
        await client.start_container(params.container)


def _bench_mount(spec: dict[str, Any]) -> None:
    spec["mounts"].append(
        {"destination": "/bench", "source": SHARED, "type": "bind", "options": ["bind", "ro"]}
    )


def _everything(spec: dict[str, Any]) -> None:
    spec["mounts"] = [
        {"destination": "/proc", "source": "proc", "type": "proc"},
        {"destination": SEEN, "source": "/", "type": "bind", "options": ["rbind", "rw"]},
    ]
    spec["linux"] = {
        "namespaces": [{"type": "mount"}],
        "resources": {"devices": [{"allow": True, "access": "rwm"}]},
    }
    del spec["hostname"]
    process = spec["process"]
    process["capabilities"] = dict.fromkeys(("bounding", "effective", "permitted"), ALL_CAPABILITIES)
    process["noNewPrivileges"] = False
