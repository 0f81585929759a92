"""An agent that is no guest's: it measures this machine's clock and generator, and changes neither."""

from __future__ import annotations

import asyncio
import time

import pytest

from gcsagent.host import clock
from protocol.errors import Code, RpcError
from protocol.families.guest import AddEntropy, Entropy
from protocol.method import Empty
from tests.cases.agents import RunningAgent
from tests.cases.target import Target, connect


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
