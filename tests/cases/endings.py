"""Cases about ends that come from outside: signals to one and to all, what goes with init, want of memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from gcsagent.host.client import Client
from protocol.errors import Code
from protocol.schema import from_wire, to_wire
from protocol.types import Oom, OomScope, Reason, Status
from tests.cases.target import (
    MIB,
    OUTPUT,
    PIPES,
    Target,
    case,
    connect,
    created,
    event,
    executing,
    expect,
    raw_call,
    refused,
    run,
    running,
)

LIMIT = 48 * MIB
HOG = "x = bytearray(256 << 20)"
HUNGRY = ("python3", "-I", "-S", "-c", HOG)
Change = Callable[[dict[str, Any]], None]


def limited(spec: dict[str, Any]) -> None:
    """Swap does not help it either, where there is any."""
    memory = {"limit": LIMIT, "swap": LIMIT}
    spec["linux"].setdefault("resources", {})["memory"] = memory


@case
async def a_process_that_runs_out_of_memory_is_told_of_at_once(target: Target) -> None:
    """An exec is killed, init lives on: the event says which, and the exit record says the same."""
    async with (
        await connect(target) as client,
        await client.events() as events,
        running(target, client, spec=limited) as init,
        executing(client, init.container, *HUNGRY) as hog,
    ):
        record = await hog.wait()
        assert (record.exit_code, record.signal, record.reason) == (137, 9, Reason.OOM)
        told = await event(events, "container.oom", init.container)
        assert abs(told.time_ns - record.exited_at_ns) < 1_000_000_000 * target.pace
        oom = from_wire(Oom, told.data)
        assert (oom.scope, oom.kills, oom.new) == (OomScope.CONTAINER, 1, 1)
        assert [(each.pid, each.process, each.command) for each in oom.victims] == [
            (hog.pid, hog.process, "python3")
        ]
        assert oom.cgroup == oom.limit_cgroup
        assert oom.cgroup.endswith(f"/{init.container}")
        assert record.oom == oom
        ended = await event(events, "process.exited", init.container, hog.process)
        assert (ended.data, ended.seq > told.seq) == (to_wire(record), True)
        state = await client.process_state(init.container, "init")
        assert state.exit is None
        await init.kill("KILL")
        last = await client.wait_container(init.container)
        assert (last.reason, last.oom) == (Reason.SIGNALLED, oom)


@case
async def init_that_runs_out_of_memory(target: Target) -> None:
    async with (
        await connect(target) as client,
        await client.events() as events,
        running(target, client, *HUNGRY, spec=limited) as init,
    ):
        record = await client.wait_container(init.container)
        assert (record.exit_code, record.reason) == (137, Reason.OOM)
        told = await event(events, "container.oom", init.container)
        assert record.oom == from_wire(Oom, told.data)
        assert record.oom is not None
        assert [(each.pid, each.process) for each in record.oom.victims] == [(init.pid, "init")]


@case
async def a_child_that_runs_out_of_memory_is_told_of_while_its_parents_live(target: Target) -> None:
    """Nobody's exit says so: the event comes from the kernel's own notice. Twice: each is told once."""
    script = f"python3 -I -S -c '{HOG}'; echo $?; read line; python3 -I -S -c '{HOG}'; exit 6"
    async with (
        await connect(target) as client,
        await client.events() as events,
        running(target, client, spec=limited) as init,
        executing(client, init.container, "sh", "-c", f"{script}", stdio=PIPES) as shell,
    ):
        async with asyncio.timeout(3 * target.pace):
            await expect(shell.streams["stdout"], b"137\n")
            first = from_wire(Oom, (await event(events, "container.oom", init.container)).data)
        assert (first.kills, first.new, first.scope) == (1, 1, OomScope.CONTAINER)
        [victim] = first.victims
        assert (victim.process, victim.command) == ("", "python3")
        assert victim.pid not in (init.pid, shell.pid)
        await shell.streams["stdin"].write(b"\n")
        record = await shell.wait()
        assert (record.exit_code, record.reason, record.oom) == (6, Reason.EXITED, None)
        second = from_wire(Oom, (await event(events, "container.oom", init.container)).data)
        assert (second.kills, second.new, len(second.victims)) == (2, 1, 1)
        await init.kill("KILL")
        last = await client.wait_container(init.container)
        assert (last.reason, last.oom) == (Reason.SIGNALLED, second)


def shared(spec: dict[str, Any]) -> None:
    """No pid namespace of its own: nothing ends with init by itself. And no more pids than a test needs."""
    kinds = spec["linux"]["namespaces"]
    spec["linux"]["namespaces"] = [kind for kind in kinds if kind["type"] != "pid"]
    few_pids(spec)


def few_pids(spec: dict[str, Any]) -> None:
    spec["linux"].setdefault("resources", {})["pids"] = {"limit": 40}


BOMB = """
import os
print("ready", flush=True)
while True:
    try:
        if os.fork() and os.fork():
            os._exit(0)
    except OSError:
        pass
"""
"""Whoever has two children is replaced by them: to read who is there and to kill those is never enough."""


async def none_left(client: Client, container: str) -> None:
    """The pids controller counts until they are reaped, too, which is a moment after their death."""
    async with asyncio.timeout(10):
        while (await client.container_stats(container)).pids.current:
            pass
    assert await client.container_processes(container) == ()


@case
async def a_fork_bomb_ends_with_an_init_that_shares_its_pids(target: Target) -> None:
    command = f"python3 -I -S -c '{BOMB}' & exec sleep 100000"
    async with (
        await connect(target) as client,
        await client.events() as events,
        running(target, client, "sh", "-c", command, stdio=OUTPUT, spec=shared) as init,
    ):
        await expect(init.streams["stdout"], b"ready\n")
        async with asyncio.timeout(5 * target.pace):
            await client.kill_container(init.container, "KILL")
            assert (await client.wait_container(init.container)).signal == 9
        await none_left(client, init.container)
        await event(events, "stream.end", init.container, "init")
        await client.delete_container(init.container)


async def _running_in(client: Client, container: str) -> set[str]:
    found = await client.container_processes(container)
    return {each.command.partition(" ")[0] for each in found if each.running}


@case
async def a_signal_to_all_reaches_those_that_are_being_forked(target: Target) -> None:
    """Init, which is pid 1 there and handles nothing, is left alone; so is one that does handle it."""
    trap = "trap 'echo told' TERM; echo ready; while :; do sleep 0.01; done"
    async with (
        await connect(target) as client,
        running(target, client, spec=few_pids) as init,
        executing(client, init.container, "bash", "-c", trap) as trapping,
        executing(client, init.container, "python3", "-I", "-S", "-c", BOMB) as bomb,
    ):
        for process in (trapping, bomb):
            await expect(process.streams["stdout"], b"ready\n")
        async with asyncio.timeout(5 * target.pace):
            await client.kill_container(init.container, "TERM", everyone=True)
            await expect(trapping.streams["stdout"], b"told\n")
            await bomb.wait()
        # They take a moment to die; one that got away would have filled the room there is with more.
        async with asyncio.timeout(5 * target.pace):
            while not await _running_in(client, init.container) <= {"sleep", "bash"}:
                pass
        await client.kill_container(init.container, "KILL", everyone=True)
        assert (await client.wait_container(init.container)).signal == 9
        assert (await trapping.wait()).signal == 9


@case
async def a_paused_container_takes_a_signal_to_all_when_it_is_resumed(target: Target) -> None:
    trap = "trap 'exit 5' TERM; echo ready; while :; do sleep 0.01; done"
    async with (
        await connect(target) as client,
        running(target, client, "bash", "-c", trap, stdio=OUTPUT) as init,
    ):
        await expect(init.streams["stdout"], b"ready\n")
        await client.pause_container(init.container)
        await client.kill_container(init.container, "TERM", everyone=True)
        assert (await client.container_state(init.container)).status is Status.PAUSED
        await client.resume_container(init.container)
        assert (await client.wait_container(init.container)).exit_code == 5


@case
async def a_signal_goes_by_any_of_its_names_to_init_and_to_an_exec(target: Target) -> None:
    trap = "trap 'echo got' RTMIN+3 RTMAX-1; echo ready; while :; do sleep 0.01; done"
    async with (
        await connect(target) as client,
        running(target, client, "bash", "-c", trap, stdio=OUTPUT) as init,
        executing(client, init.container, "bash", "-c", trap) as process,
    ):
        for each in (init, process):
            out = each.streams["stdout"]
            await expect(out, b"ready\n")
            for wanted in ("RTMIN+3", "sigrtmin+3", 37, "SIGRTMAX-1", 63):
                await client.kill_process(each.container, each.process, wanted)
                await expect(out, b"got\n")
        for nonsense in ("RTMIN+31", "RTMAX+1", "RTMIN-1", "SIGNONSENSE", "RTMIN+", "", 0, 65, -1, True):
            for method, whom in (("container.kill", {}), ("process.kill", {"process": process.process})):
                with refused(Code.INVALID_ARGUMENT):
                    params = {"container": init.container, "signal": nonsense, **whom}
                    await raw_call(target, method, params)


DAEMON = """
import os
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.write(1, b"%d\\n" % os.getpid())
        os._exit(3)
    os._exit(0)
os.wait()
"""


@case
async def a_daemon_that_nobody_waits_for_is_no_zombie(target: Target) -> None:
    async with (
        await connect(target) as client,
        running(target, client, spec=shared) as init,
        executing(client, init.container, "python3", "-I", "-S", "-c", DAEMON) as process,
    ):
        pid = int(await expect(process.streams["stdout"], rb"\d+\n"))
        gone = f"while [ -e /proc/{pid} ]; do sleep 0.01; done"
        assert (await run(client, init.container, "timeout", "5", "sh", "-c", gone)).exit.exit_code == 0


CAP_SYS_RESOURCE = 24


@case
async def containers_do_not_inherit_the_agents_protection(target: Target) -> None:
    """From inside; and with the guest's pids in sight, that agent and supervisor have it if they may."""
    look = "cat /proc/self/oom_score_adj"
    async with (
        await connect(target) as client,
        running(target, client, "sh", "-c", f"{look}; exec sleep 100000", stdio=OUTPUT, spec=shared) as init,
    ):
        await expect(init.streams["stdout"], b"^0\n")
        assert (await run(client, init.container, "sh", "-c", look)).stdout == b"0\n"
        agent = f"/proc/{(await client.info()).agent_pid}"
        parent = f"/proc/$(cut -d ' ' -f 4 {agent}/stat)"
        command = f"grep CapEff {agent}/status; cat {agent}/oom_score_adj {parent}/oom_score_adj"
        _, capabilities, *scores = (await run(client, init.container, "sh", "-c", command)).stdout.split()
        allowed = int(capabilities, 16) >> CAP_SYS_RESOURCE & 1
        assert scores == [b"-999" if allowed else b"0"] * 2


@case
async def the_runtime_does_not_inherit_the_agents_protection(target: Target) -> None:
    """A hook is the runtime's child: this one fails unless it and its parent have none."""
    hook = '[ "$(cat /proc/self/oom_score_adj /proc/$PPID/oom_score_adj | tr -d "\\n")" = 00 ]'
    shell = "/bin/busybox" if target.rootfs.startswith("/run/gcs/") else "/bin/sh"

    def hooked(spec: dict[str, Any]) -> None:
        spec["hooks"] = {"createRuntime": [{"path": shell, "args": ["sh", "-c", hook], "timeout": 30}]}

    async with await connect(target) as client, created(target, client, spec=hooked) as init:
        assert (await client.container_state(init.container)).status is Status.CREATED
