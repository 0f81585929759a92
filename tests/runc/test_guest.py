"""An agent that is no guest's: it measures this machine's clock and generator, and changes neither."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import time

import pytest

from gcsagent.host import clock
from protocol.errors import Code, RpcError
from protocol.families.guest import (
    AddEntropy,
    Entropy,
    Online,
    PressureRef,
    PressureResource,
    Resources,
    WatchPressure,
)
from protocol.method import Empty
from tests.cases.agents import RunningAgent
from tests.cases.target import Target, connect, event, refused


def test_it_measures_and_leaves_the_machine_alone(agent: RunningAgent, rootfs: str) -> None:
    async def body() -> None:
        async with await connect(Target(agent.address, rootfs, box="", pace=1.0, execs=1)) as client:
            found = await clock.measure(client)
            assert abs(found.offset_ns) <= found.error_ns < 10**9
            assert found.samples == clock.SAMPLES
            before = time.time_ns() - time.monotonic_ns()
            for attempt in (clock.sync(client), client.call("guest.add_entropy", AddEntropy(b"x"))):
                with pytest.raises(RpcError) as caught:
                    await attempt
                assert caught.value.code is Code.FAILED_PRECONDITION
            assert abs(time.time_ns() - time.monotonic_ns() - before) < 10**9
            entropy: Entropy = await client.call("guest.entropy", Empty())
            assert 0 < entropy.available_bits <= entropy.pool_bits

    asyncio.run(body())


BUSY = "while True: pass"


def test_pressure_is_told_by_a_successor(agent: RunningAgent, rootfs: str) -> None:
    """CPUs that are all wanted twice. Without CAP_SYS_RESOURCE a window must be a multiple of 2 s."""
    wanted = WatchPressure("busy", PressureResource.CPU, stall_us=1000, window_us=2_000_000)
    target = Target(agent.address, rootfs, box="", pace=1.0, execs=1)

    async def begin() -> None:
        async with await connect(target) as client:
            await client.call("guest.watch_pressure", wanted)
            await client.call("guest.watch_pressure", wanted)
            with refused(Code.ALREADY_EXISTS):
                await client.call("guest.watch_pressure", WatchPressure("busy"))
            with refused(Code.INVALID_ARGUMENT, field="window_us"):
                await client.call(
                    "guest.watch_pressure", WatchPressure("x", stall_us=2_000_001, window_us=2_000_000)
                )
            with refused(Code.NOT_FOUND):
                await client.call("guest.watch_pressure", WatchPressure("x", container="nobody"))

    async def go_on() -> None:
        async with await connect(target) as client, await client.events(after=0) as events:
            told = await asyncio.wait_for(event(events, "cpu.pressure", ""), 30)
            assert (told.data["watch"], told.data["kind"]) == ("busy", "some")
            assert told.data["some_total_us"] >= 1000
            found: Resources = await client.call("guest.resources", Empty())
            assert found.pressure_watches == (wanted,)
            assert found.cpus.online
            assert found.memory.total_kib > found.memory.available_kib > 0
            await client.call("guest.unwatch_pressure", PressureRef("busy"))
            with refused(Code.NOT_FOUND):
                await client.call("guest.unwatch_pressure", PressureRef("busy"))
            with refused(Code.FAILED_PRECONDITION):
                await client.call("guest.online", Online())

    with contextlib.ExitStack() as stack:
        asyncio.run(begin())
        agent.kill_agent()
        for _ in range(2 * (os.cpu_count() or 1)):
            busy = stack.enter_context(subprocess.Popen([sys.executable, "-c", BUSY]))
            stack.callback(busy.kill)
        asyncio.run(go_on())
