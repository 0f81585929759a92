"""A VM that gets more CPUs and memory while it runs, tells of pressure, and gives free memory back."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gcsagent.host.client import Client
from gcsagent.host.grow import grow
from gcsagent.host.vm.config import VmConfig
from gcsagent.host.vm.errors import InvalidVmConfig
from gcsagent.host.vm.launcher import VirtualMachine
from protocol.errors import Code, RpcError
from protocol.families.guest import Online, PressureKind, PressureRef, Resources, WatchPressure
from protocol.method import Empty
from tests.cases.agents import eventually
from tests.cases.machines import PACE
from tests.cases.target import OUTPUT, Target, connect, event, run, running

# The first test boots the VM, and may build its image.
pytestmark = pytest.mark.timeout(1300)
ROOTFS = "/run/gcs/disks/rootfs"
BOOT_SECONDS, SECONDS, END_SECONDS = 240.0, 180.0, 90.0
MIB = 1 << 20
MEMORY_MIB, PIECE_MIB = 512, 256
EATEN_MIB = 200
EAT = f"import time; food = b'x' * ({EATEN_MIB} << 20); print('full', flush=True); time.sleep(1000)"
THRASH = (
    "import mmap\n"
    "with open('/t', 'wb') as file: file.truncate(64 << 20)\n"
    "with open('/t', 'r+b') as file: memory = mmap.mmap(file.fileno(), 64 << 20)\n"
    "while True:\n"
    "    for at in range(0, 64 << 20, 4096): memory[at] = 1\n"
)


async def _grow(machine: VirtualMachine, target: Target, client: Client) -> None:
    before: Resources = await client.call("guest.resources", Empty())
    assert (before.cpus.possible, before.cpus.present, before.cpus.online) == ("0-2", "0-2", "0")
    assert (before.memory.block_bytes, before.memory.offline) == (128 * MIB, "")
    async with running(target, client) as box:
        assert (await run(client, box.container, "nproc")).stdout == b"1\n"
        after = await grow(machine.monitor, client, cpus=2, memory_mib=PIECE_MIB)
        assert (after.cpus.present, after.cpus.online) == ("0-2", "0-2")
        assert after.memory.total_kib - before.memory.total_kib == PIECE_MIB * 1024
        assert after.memory.offline == ""
        assert (await run(client, box.container, "nproc")).stdout == b"3\n"
        meminfo = (await run(client, box.container, "cat", "/proc/meminfo")).stdout
        assert f"MemTotal: {after.memory.total_kib:14d} kB".encode() in meminfo
        assert (await client.info()).cpus == 3
    again: Resources = await client.call("guest.online", Online())
    assert (again.cpus, again.memory.online) == (after.cpus, after.memory.online)
    with pytest.raises(InvalidVmConfig, match="room for 0 more"):
        await grow(machine.monitor, client, cpus=1)
    with pytest.raises(InvalidVmConfig, match="multiples of 128 MiB"):
        await grow(machine.monitor, client, memory_mib=64)
    with pytest.raises(RpcError) as caught:
        await client.call("guest.online", Online(cpus="7", wait_ms=10))
    assert (caught.value.code, caught.value.details["field"]) == (Code.NOT_FOUND, "cpus")


async def _press(client: Client, target: Target) -> None:
    """One that has less memory than it wants; the watch outlives the agent, and ends with the container."""

    def tight(spec: dict[str, object]) -> None:
        resources = {"memory": {"limit": 24 * MIB}}
        linux = spec["linux"]
        assert isinstance(linux, dict)
        linux["resources"] = resources

    async with await client.events() as events:
        async with running(target, client, "python3", "-I", "-S", "-c", THRASH, spec=tight) as box:
            wanted = WatchPressure(
                "w", kind=PressureKind.FULL, stall_us=20_000, window_us=500_000, container=box.container
            )
            await client.call("guest.watch_pressure", wanted)
            told = await event(events, "memory.pressure", box.container)
            assert (told.data["watch"], told.data["kind"]) == ("w", "full")
            assert told.data["full_total_us"] > 0  # averaged apart from triggers: it may lag behind them
            await client.call("guest.watch_pressure", wanted)
            assert (await client.call("guest.resources", Empty())).pressure_watches == (wanted,)
        await event(events, "container.deleted", box.container)
        await asyncio.wait_for(_until_no_watch(client), 10)
    await client.call("guest.watch_pressure", WatchPressure("all"))
    await client.call("guest.unwatch_pressure", PressureRef("all"))
    with pytest.raises(RpcError) as caught:
        await client.call("guest.unwatch_pressure", PressureRef("all"))
    assert caught.value.code is Code.NOT_FOUND


async def _until_no_watch(client: Client) -> None:
    while (await client.call("guest.resources", Empty())).pressure_watches:
        await client.ping()


async def _give_back(machine: VirtualMachine, target: Target, client: Client) -> None:
    """What a container has used and let go of is this host's again."""
    before = _used(machine)
    async with running(target, client, "python3", "-I", "-S", "-c", EAT, stdio=OUTPUT) as box:
        assert await box.streams["stdout"].read(5) == b"full\n"
        full = _used(machine)
    assert full > before
    less = await asyncio.to_thread(eventually, lambda: _used(machine) < full - EATEN_MIB * MIB // 2, 60.0)
    print(f"memory spent: {before >> 20} MiB, full {full >> 20} MiB, afterwards {_used(machine) >> 20} MiB")
    assert less


def _used(machine: VirtualMachine) -> int:
    """Bytes of the guest's memory that this host has spent."""
    status = Path(f"/proc/{machine.pid}/status").read_text()
    return sum(int(each) << 10 for each in re.findall(r"^Rss(?:Shmem|Anon):\s+(\d+)", status, re.MULTILINE))


@contextlib.asynccontextmanager
async def _machine(config: VmConfig) -> AsyncIterator[VirtualMachine]:
    async with asyncio.timeout(BOOT_SECONDS):
        machine = await VirtualMachine.launch(config)
    try:
        yield machine
        async with await Client.connect(machine.address) as client, asyncio.timeout(END_SECONDS):
            await client.shutdown()
            ended = await machine.wait()
        assert (ended.clean, ended.status, ended.findings) == (True, 0, ()), ended
    finally:
        print("\n".join(machine.console.lines()[-60:]))
        machine.destroy()


def test_a_vm_grows_is_pressed_and_gives_back(built_image: Path, rootfs_image: Path, tmp_path: Path) -> None:
    config = VmConfig(
        name="growing",
        memory_mib=MEMORY_MIB,
        max_memory_mib=2 * MEMORY_MIB,
        cpus=1,
        max_cpus=3,
        image=built_image,
        rootfs=rootfs_image,
        console_log=tmp_path / "console",
        cmdline=("memhp_default_state=offline",),
    )

    async def body() -> None:
        async with _machine(config) as machine, asyncio.timeout(SECONDS):
            target = Target(machine.address, ROOTFS, box="", pace=PACE[machine.accel.name], execs=1)
            async with await connect(target) as client:
                await _grow(machine, target, client)
                await _press(client, target)
                await _give_back(machine, target, client)

    asyncio.run(body())
