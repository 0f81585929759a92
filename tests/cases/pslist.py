"""Cases about what processes a container has: ours, theirs, and those that have ended."""

from __future__ import annotations

from typing import Any

from gcsagent.host.client import Client
from protocol.errors import Code
from protocol.families.container import ListProcesses, ProcessList
from protocol.usage import ContainerProcess
from tests.cases.target import (
    OUTPUT,
    PIPES,
    Target,
    case,
    connect,
    created,
    executing,
    expect,
    raw_call,
    refused,
    running,
)

FAMILY = """
import os, sys, time
dead = os.fork()
if dead == 0:
    os._exit(3)
child = os.fork()
if child == 0:
    os.setuid(7)
    held = b"x" * (8 << 20)
    while time.process_time() < 0.2: pass
    print("busy", flush=True)
    time.sleep(100000)
os.waitid(os.P_PID, dead, os.WEXITED | os.WNOWAIT)
print("ready", dead, child, flush=True)
time.sleep(100000)
"""
"""A child that is never waited for, and one with another user that has burnt CPU time."""


@case
async def every_process_of_a_container_says_what_it_is(target: Target) -> None:
    async with (
        await connect(target) as client,
        running(target, client, "python3", "-c", FAMILY, stdio=OUTPUT) as init,
        executing(client, init.container, "sleep", "100000") as process,
    ):
        before = (await client.info()).time_ns
        seen = bytearray()
        ready = (await expect(init.streams["stdout"], b"(?s)ready (.*) (.*)\n", seen)).split()
        if b"busy" not in ready:
            await expect(init.streams["stdout"], b"busy", seen)
        dead, child = int(ready[ready.index(b"ready") + 1]), int(ready[ready.index(b"ready") + 2])
        found = {each.ns_pid: each for each in await client.container_processes(init.container)}
        assert len(found) == 4
        first, zombie, other = found.pop(1), found.pop(dead), found.pop(child)
        [(_, exec_)] = found.items()
        assert _truths(first) == (True, True, False, "init")
        assert _truths(zombie) == (False, False, True, "")
        assert _truths(other) == (True, False, False, "")
        assert _truths(exec_) == (True, True, False, process.process)
        assert (first.pid, exec_.pid) == (init.pid, process.pid)
        assert zombie.ppid == other.ppid == init.pid
        assert (first.uid, other.uid) == (0, 7)
        assert first.command.startswith("python3 -c ")
        assert (exec_.command, zombie.command) == ("sleep 100000", "[python3]")
        assert (exec_.state, zombie.state, zombie.rss_bytes) == ("S", "Z", 0)
        assert other.rss_bytes >= 8 << 20
        assert other.cpu_us >= 150_000
        state = await client.container_state(init.container)
        hour = 3600 * 10**9
        assert before - hour < state.created_at_ns - 10**9 <= first.started_at_ns <= exec_.started_at_ns
        assert exec_.started_at_ns <= (await client.info()).time_ns


@case
async def processes_sharing_the_guests_pids_are_those_of_the_cgroup(target: Target) -> None:
    def share_pids(spec: dict[str, Any]) -> None:
        kinds = spec["linux"]["namespaces"]
        spec["linux"]["namespaces"] = [kind for kind in kinds if kind["type"] != "pid"]

    script = "sleep 100000 & echo ready $!; exec sleep 99999"
    async with (
        await connect(target) as client,
        running(target, client, "sh", "-c", script, stdio=OUTPUT, spec=share_pids) as init,
    ):
        child = int((await expect(init.streams["stdout"], b"ready .*\n")).split()[1])
        found = await client.container_processes(init.container)
        assert {each.pid: each.ns_pid for each in found} == {init.pid: init.pid, child: child}
        assert {each.pid: each.process for each in found} == {init.pid: "init", child: ""}


@case
async def more_processes_than_fit_are_counted_and_come_page_by_page(target: Target) -> None:
    script = "for n in 1 2 3 4; do sleep 100000 & done; echo ready; wait"
    async with (
        await connect(target) as client,
        running(target, client, "sh", "-c", script, stdio=OUTPUT) as init,
    ):
        await expect(init.streams["stdout"], b"ready\n")
        everything = await client.container_processes(init.container)
        assert len(everything) == 5
        paged: list[ContainerProcess] = []
        for left_out in (3, 1, 0):
            after = paged[-1].pid if paged else 0
            page: ProcessList = await client.call(
                "container.processes", ListProcesses(init.container, after, 2)
            )
            assert page.left_out == left_out
            paged += page.processes
        assert [each.pid for each in paged] == [each.pid for each in everything]
        for field, value in (("limit", 0), ("limit", 5000), ("after", -1)):
            with refused(Code.INVALID_ARGUMENT, field=field):
                await raw_call(target, "container.processes", {"container": init.container, field: value})


@case
async def processes_in_every_stage_of_a_container(target: Target) -> None:
    async with await connect(target) as client, created(target, client, stdio=PIPES) as init:
        [waiting] = await client.container_processes(init.container)
        assert _truths(waiting) == (True, True, False, "init")
        await init.start()
        await client.pause_container(init.container)
        [paused] = await client.container_processes(init.container)
        assert (paused.pid, paused.running, paused.command) == (init.pid, True, "sleep 100000")
        await client.resume_container(init.container)
        await client.kill_container(init.container, "KILL")
        await client.wait_container(init.container)
        assert await client.container_processes(init.container) == ()
        with refused(Code.NOT_FOUND):
            await client.container_processes("nobody")


@case
async def processes_that_come_and_go_while_they_are_listed(target: Target) -> None:
    """Each answer is whole: what is in it was read of one process, and init is always there."""
    script = "while :; do sleep 0.05 & sh -c 'exit 0' & wait; done"
    async with await connect(target) as client, running(target, client, "sh", "-c", script) as init:
        others: set[int] = set()
        while len(others) < 5:  # within the case's time
            others |= await _look(client, init.container, init.pid)


async def _look(client: Client, container: str, init: int) -> set[int]:
    found = {each.pid: each for each in await client.container_processes(container)}
    assert _truths(found.pop(init)) == (True, True, False, "init")
    for each in found.values():
        assert not each.created_by_runtime
        assert each.running is not each.zombie
        assert each.command
    return set(found)


def _truths(process: ContainerProcess) -> tuple[bool, bool, bool, str]:
    return process.running, process.created_by_runtime, process.zombie, process.process
