"""What an exec costs beyond runc: alone, and many at once."""

from __future__ import annotations

import asyncio
import itertools
import time

from gcsagent.host.client import Client
from gcsagent.host.process import RemoteProcess
from gcsagent.host.spec import exec_spec
from protocol.families.process import Exec
from tests.bench.figures import Measured, at_most, figure, in_turn
from tests.bench.host import BOX, Host, bare, finish, start
from tests.cases.target import OUTPUT, forget

AT_ONCE = 32
TRUE = exec_spec(args=("true",))
_numbers = itertools.count(1)


async def one(client: Client) -> float:
    """Seconds from the request to its exit, with both outputs attached; what is left of it goes untimed."""
    began = time.perf_counter()
    process = await run(client)
    took = time.perf_counter() - began
    process.detach()
    await forget(client, process)
    return took


async def at_once(client: Client, count: int) -> float:
    """Seconds until the last of so many has ended."""
    began = time.perf_counter()
    processes = await asyncio.gather(*(run(client) for _ in range(count)))
    took = time.perf_counter() - began
    for process in processes:
        process.detach()
        await forget(client, process)
    return took


async def run(client: Client) -> RemoteProcess:
    params = Exec(BOX, f"true{next(_numbers)}", TRUE, OUTPUT)
    process = await RemoteProcess.exec(client, params)
    record = await process.wait()
    if record.exit_code:
        raise RuntimeError(f"true ended with {record}")
    return process


@figure(
    "exec",
    tier="host",
    what="exec of `true`, request to exit, output attached",
    baseline="`runc exec` of the same into a pipe",
    target=at_most(1.05),
    scale=1000,
    samples=100,
)
async def exec_true(host: Host, samples: int) -> Measured:
    command = host.bare_exec("true")

    async def theirs() -> float:
        return bare(command)

    return await in_turn(samples, lambda: one(host.client), theirs)


@figure(
    "exec-32",
    tier="host",
    what="the same, 32 at once, until the last has ended",
    baseline="32 `runc exec` at once",
    target=at_most(1.05),
    scale=1000,
    samples=20,
)
async def exec_at_once(host: Host, samples: int) -> Measured:
    command = host.bare_exec("true")

    async def theirs() -> float:
        began = time.perf_counter()
        for started in [start(command) for _ in range(AT_ONCE)]:
            finish(started)
        return time.perf_counter() - began

    return await in_turn(samples, lambda: at_once(host.client, AT_ONCE), theirs, seconds=60)
