"""A container that eats all memory of the guest: it dies of it, and nobody else so much as hangs."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from gcsagent.host.client import Client
from gcsagent.host.vm.config import VmConfig
from gcsagent.host.vm.console import Finding
from gcsagent.host.vm.launcher import VirtualMachine
from protocol.schema import from_wire
from protocol.types import Oom, OomScope, Reason, Status
from tests.cases.machines import PACE
from tests.cases.target import Target, connect, event, run, running

# The first test boots the VM, and may build its image.
pytestmark = pytest.mark.timeout(1300)
ROOTFS = "/run/gcs/disks/rootfs"
MEMORY_MIB = 384
BOOT_SECONDS, SECONDS, END_SECONDS = 240.0, 120.0, 90.0
EAT = "food = []\nwhile True:\n    food.append(b'x' * (4 << 20))"
HOG = ("python3", "-I", "-S", "-c", EAT)
SHELL = ("sh", "-c", f'python3 -I -S -c "{EAT}"; exit 6')


async def _talk(client: Client, container: str, over: asyncio.Event) -> int:
    """Pings, and execs in a container that has nothing to do with it; returns how many were answered."""
    count = 0
    while not over.is_set():
        await client.ping()
        done = await run(client, container, "echo", "here")
        assert (done.stdout, done.exit.exit_code) == (b"here\n", 0)
        count += 1
    return count


async def _eat(client: Client, target: Target) -> None:
    """Init is the one that eats; then a child of it, whose end only the kernel sees."""
    async with await client.events() as events:
        async with running(target, client, *HOG) as hog:
            record = await hog.wait()
            told = from_wire(Oom, (await event(events, "container.oom", hog.container)).data)
            assert (record.exit_code, record.signal, record.reason) == (137, 9, Reason.OOM)
            assert record.oom == told
            assert (told.scope, told.kills, told.limit_cgroup) == (OomScope.MACHINE, 1, "")
            assert [(each.pid, each.process) for each in told.victims] == [(hog.pid, "init")]
            assert (await client.container_state(hog.container)).status is Status.STOPPED
        async with running(target, client, *SHELL) as shell:
            record = await shell.wait()
            told = from_wire(Oom, (await event(events, "container.oom", shell.container)).data)
            assert (record.exit_code, record.reason, record.oom) == (6, Reason.EXITED, told)
            assert [each.process for each in told.victims] == [""]


async def _survive(machine: VirtualMachine) -> None:
    target = Target(machine.address, ROOTFS, box="box", pace=PACE[machine.accel.name], execs=1)
    async with await connect(target) as client, asyncio.timeout(SECONDS):
        before = await client.info()
        async with running(target, client) as other, asyncio.TaskGroup() as tasks:
            over = asyncio.Event()
            talking = tasks.create_task(_talk(client, other.container, over))
            await _eat(client, target)
            over.set()
            assert await talking > 0
            state = await client.process_state(other.container, "init")
            assert (state.pid, state.exit) == (other.pid, None)
        after = await client.info()
        assert (after.generation, after.agent_pid) == (before.generation, before.agent_pid)
        assert await client.list_containers() == ()


async def _power_off(machine: VirtualMachine) -> None:
    async with await Client.connect(machine.address) as client, asyncio.timeout(END_SECONDS):
        await client.shutdown()
        ended = await machine.wait()
    assert (ended.clean, ended.status) == (True, 0), ended
    unexpected = [each for each in ended.findings if not _is_want_of_memory(each)]
    assert not unexpected, unexpected


def _is_want_of_memory(finding: Finding) -> bool:
    """Reading ahead is allowed to fail: the kernel says that it did, and where, and reads again later."""
    return finding.kind == "trace" or (finding.kind == "disk" and "readahead error" in finding.line)


def test_a_container_that_eats_all_memory_ends_alone(
    built_image: Path, rootfs_image: Path, tmp_path: Path
) -> None:
    config = VmConfig(
        name="hungry",
        memory_mib=MEMORY_MIB,
        image=built_image,
        rootfs=rootfs_image,
        console_log=tmp_path / "console",
    )
    with asyncio.Runner() as runner:
        machine = runner.run(asyncio.wait_for(VirtualMachine.launch(config), BOOT_SECONDS))
        try:
            runner.run(_survive(machine))
            runner.run(_power_off(machine))
        finally:
            print("\n".join(machine.console.lines()[-80:]))
            machine.destroy()
