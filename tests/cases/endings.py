"""Cases about ends that come from outside: the kernel's, for want of memory; signals to everybody."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from protocol.schema import from_wire, to_wire
from protocol.types import Oom, OomScope, Reason
from tests.cases.target import (
    MIB,
    PIPES,
    Target,
    case,
    connect,
    event,
    executing,
    expect,
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
