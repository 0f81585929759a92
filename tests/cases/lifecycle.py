"""Cases about what is done to a container that runs: paused and resumed, measured, limited."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

import pytest

from gcsagent.host.client import Client
from protocol.errors import Code, RpcError
from protocol.types import Status
from protocol.usage import RuntimeView
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

ECHO = "echo ready; while read line; do echo got $line; done"


@case
async def a_paused_container_does_nothing_until_it_is_resumed(target: Target) -> None:
    """Its cgroup says that every process has stopped; what was sent meanwhile is taken afterwards."""
    async with (
        await connect(target) as client,
        await client.events() as events,
        running(target, client, "sh", "-c", ECHO, stdio=PIPES) as init,
    ):
        out = init.streams["stdout"]
        await expect(out, b"ready\n")
        await client.pause_container(init.container)
        await event(events, "container.paused", init.container)
        state = await client.container_state(init.container)
        assert (state.status, state.processes[0].status) == (Status.PAUSED, Status.RUNNING)
        await init.streams["stdin"].write(b"one\n")
        frozen = await run(client, target.box, "true")  # others run on
        assert frozen.exit.exit_code == 0
        await client.resume_container(init.container)
        await event(events, "container.resumed", init.container)
        await expect(out, b"got one\n")
        assert (await client.container_state(init.container)).status is Status.RUNNING
        assert (await run(client, init.container, "echo", "alive")).stdout == b"alive\n"


@case
async def a_signal_to_a_paused_container_acts_when_it_is_resumed(target: Target) -> None:
    script = "trap 'echo $n; exit 0' TERM; n=0; echo ready; while :; do n=$((n + 1)); done"
    async with (
        await connect(target) as client,
        running(target, client, "bash", "-c", script, stdio=OUTPUT) as init,
    ):
        out = init.streams["stdout"]
        await expect(out, b"ready\n")
        await client.pause_container(init.container)
        await client.kill_container(init.container, "TERM")
        assert (await client.process_state(init.container)).exit is None
        await client.resume_container(init.container)
        await expect(out, b"[0-9]+\n")
        assert (await client.wait_container(init.container)).exit_code == 0


@case
async def a_pause_cut_off_by_its_deadline_leaves_the_container_running(target: Target) -> None:
    """No runtime can be started within a millisecond."""
    async with await connect(target) as client, running(target, client) as init:
        with refused(Code.DEADLINE_EXCEEDED):
            await raw_call(target, "container.pause", {"container": init.container, "deadline_ms": 1})
        assert (await client.container_state(init.container)).status is Status.RUNNING
        assert (await run(client, init.container, "echo", "alive")).stdout == b"alive\n"
        await client.pause_container(init.container)
        await client.resume_container(init.container)


@case
async def what_a_status_does_not_allow_names_it(target: Target) -> None:
    async with await connect(target) as client, created(target, client) as init:
        await _refused(client.pause_container(init.container), "created")
        await _refused(client.resume_container(init.container), "created")
        await init.start()
        await _refused(client.resume_container(init.container), "running")
        await client.pause_container(init.container)
        await _refused(client.pause_container(init.container), "paused")
        await _refused(client.start_container(init.container), "paused")
        await _refused(client.delete_container(init.container), "paused")
        await _refused(run(client, init.container, "true"), "paused")
        assert (await client.container_state(init.container)).status is Status.PAUSED
        await client.kill_container(init.container, "KILL")
        assert (await client.wait_container(init.container)).signal == 9
        await _refused(client.pause_container(init.container), "stopped")
        await _refused(client.resume_container(init.container), "stopped")
        with refused(Code.NOT_FOUND):
            await client.pause_container("nobody")


@case
async def a_paused_container_is_deleted_with_force(target: Target) -> None:
    async with (
        await connect(target) as client,
        running(target, client) as init,
        executing(client, init.container, "sleep", "100000"),
    ):
        await client.pause_container(init.container)
        record = await client.delete_container(init.container, force=True)
        assert record is not None
        assert record.signal == 9
        with refused(Code.NOT_FOUND):
            await client.container_state(init.container)


@case
async def statistics_are_what_the_container_does(target: Target) -> None:
    """It holds memory and burns CPU time it has measured itself; its limits are those of its spec."""

    def limit(spec: dict[str, Any]) -> None:
        spec["linux"]["resources"] = {"memory": {"limit": 64 * MIB}, "pids": {"limit": 50}}

    code = (
        "import time; held = bytearray(b'x' * (20 << 20))\n"
        "while time.process_time() < 0.2: pass\n"
        "print('ready', flush=True); time.sleep(100000)"
    )
    async with (
        await connect(target) as client,
        running(target, client, "python3", "-c", code, stdio=OUTPUT, spec=limit) as init,
    ):
        before = (await client.info()).time_ns
        await expect(init.streams["stdout"], b"ready\n")
        first = await client.container_stats(init.container)
        assert before <= first.time_ns <= (await client.info()).time_ns
        memory, cpu, pids = first.memory, first.cpu, first.pids
        assert memory.current is not None
        assert memory.peak is not None
        assert 20 * MIB <= memory.current <= memory.peak <= 64 * MIB
        assert (memory.limit, pids.limit, pids.current) == (64 * MIB, 50, 1)
        assert cpu.usage_us is not None
        assert cpu.user_us is not None
        assert cpu.system_us is not None
        assert cpu.usage_us >= 190_000  # what it used before it was put into the cgroup is not in it
        assert cpu.user_us > 0
        assert first.io.read_bytes is not None
        assert first.io.writes is not None
        for pressure in (first.memory_pressure, first.cpu_pressure, first.io_pressure):
            assert pressure is None or 0 <= (pressure.some_avg10 or 0) <= 100
        await client.kill_container(init.container, "KILL")
        await client.wait_container(init.container)
        after = (await client.container_stats(init.container)).cpu.usage_us
        assert after is not None
        assert after >= cpu.usage_us


@case
async def limits_are_changed_one_by_one_and_hold(target: Target) -> None:
    script = "echo ready; read line; for n in 1 2 3 4 5 6; do sleep 100000 & done; echo never"
    async with (
        await connect(target) as client,
        running(target, client, "bash", "-c", script, stdio=PIPES) as init,
    ):
        out, where = init.streams["stdout"], init.container
        await expect(out, b"ready\n")
        await client.update_container(where, memory_bytes=96 * MIB)
        await client.update_container(where, pids=4)
        await client.update_container(where, cpus=0.5)
        found = await client.container_stats(where)
        assert (found.memory.limit, found.pids.limit) == (96 * MIB, 4)
        await init.streams["stdin"].write(b"go\n")
        await expect(init.streams["stderr"], b"fork.*\n")
        held = (await client.container_stats(where)).pids.current
        assert held is not None
        assert held <= 4


@case
async def a_cpu_limit_throttles(target: Target) -> None:
    """A tenth of a CPU is 10 ms in a period: 300 ms take it through many of them."""
    code = (
        "import time; print('ready', flush=True); input()\n"
        "until = time.process_time() + 0.3\n"
        "while time.process_time() < until: pass\n"
        "print('done', flush=True); time.sleep(100000)"
    )
    async with (
        await connect(target) as client,
        running(target, client, "python3", "-c", code, stdio=PIPES) as init,
    ):
        out = init.streams["stdout"]
        await expect(out, b"ready\n")
        await client.update_container(init.container, cpus=0.1)
        await init.streams["stdin"].write(b"go\n")
        await expect(out, b"done\n")
        cpu = (await client.container_stats(init.container)).cpu
        assert cpu.throttled_us is not None
        assert cpu.throttled_us > 100_000


@case
async def limits_can_be_changed_while_paused(target: Target) -> None:
    async with await connect(target) as client, running(target, client) as init:
        await client.pause_container(init.container)
        await client.update_container(init.container, pids=77)
        assert (await client.container_stats(init.container)).pids.limit == 77
        assert (await client.container_state(init.container)).status is Status.PAUSED
        await client.resume_container(init.container)
        assert (await run(client, init.container, "echo", "alive")).stdout == b"alive\n"


@case
async def updates_that_cannot_be_are_refused(target: Target) -> None:
    async with await connect(target) as client, running(target, client) as init:
        with refused(Code.INVALID_ARGUMENT, field="memory_bytes"):
            await client.update_container(init.container)
        for field, value in (("memory_bytes", 1), ("cpus", 0.0), ("cpus", "1"), ("pids", 0)):
            with refused(Code.INVALID_ARGUMENT, field=field):
                await raw_call(target, "container.update", {"container": init.container, field: value})
        await client.kill_container(init.container, "KILL")
        await client.wait_container(init.container)
        await _refused(client.update_container(init.container, pids=5), "stopped")


@case
async def the_runtimes_own_state_stands_beside_ours(target: Target) -> None:
    """In each stage the two agree; the times are the kernel's and the runtime's own, in their order."""
    async with await connect(target) as client, created(target, client) as init:
        began = await _agreed(client, init.container, "created")
        await init.start()
        state = await client.container_state(init.container, ask_runtime=True)
        view = await _agreed(client, init.container, "running")
        assert view.init_started_at_ns == pytest.approx(began.init_started_at_ns, abs=20_000_000)
        assert abs(view.created_at_ns - state.created_at_ns) < 60 * 10**9
        assert view.init_started_at_ns - 20_000_000 <= state.processes[0].started_at_ns
        await client.pause_container(init.container)
        await _agreed(client, init.container, "paused")
        await client.resume_container(init.container)
        await _agreed(client, init.container, "running")
        await client.kill_container(init.container, "KILL")
        await client.wait_container(init.container)
        assert (await _agreed(client, init.container, "stopped")).init_started_at_ns == 0
        assert (await client.container_state(init.container)).runtime_view is None


async def _agreed(client: Client, container: str, status: str) -> RuntimeView:
    state = await client.container_state(container, ask_runtime=True)
    view = state.runtime_view
    assert view is not None
    assert (view.problem, view.differences) == ("", ())
    assert (view.status, state.status.value) == (status, status)
    assert status == "stopped" or view.pid == state.pid > 0
    assert view.bundle == state.bundle
    return view


async def _refused(call: Awaitable[object], status: str) -> None:
    with pytest.raises(RpcError, match=f"it is {status}") as caught:
        await call
    assert caught.value.code is Code.FAILED_PRECONDITION
    assert caught.value.details["status"] == status
