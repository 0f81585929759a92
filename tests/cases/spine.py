"""The list: every case there is, for the test modules of both tiers."""

from __future__ import annotations

import asyncio
import contextlib

from gcsagent.host.client import Client
from protocol.errors import RpcError
from tests.cases import (
    data,
    endings,
    fifos,
    files,
    floods,
    forwards,
    hooks,
    hosts,
    lifecycle,
    limits,
    lives,
    network,
    oci,
    pods,
    pslist,
    requests,
    security,
    seeing,
    spools,
    storage,
    terminals,
)
from tests.cases.target import CASES, Target, connect, creation, nothing_left, remove

MODULES = (
    data,
    fifos,
    terminals,
    spools,
    lives,
    network,
    lifecycle,
    endings,
    limits,
    pslist,
    requests,
    floods,
    forwards,
    hosts,
    security,
    oci,
    pods,
    hooks,
    files,
    storage,
    seeing,
)
NAMES = {function.__name__: function for function in CASES}
assert len(NAMES) == len(CASES), "two cases have one name"

SAME_IN_A_VM = (hooks, requests)
"""What is between the agent and its client or its runtime alone: not run a second time in the VM."""
VM_NAMES = [
    name for name, function in NAMES.items() if function.__module__ not in {m.__name__ for m in SAME_IN_A_VM}
]


async def open_box(target: Target) -> None:
    """Starts the container that cases exec in."""
    async with await connect(target) as client:
        await client.create_container(creation(target, target.box, ("sleep", "100000")))
        await client.start_container(target.box)


async def close_box(target: Target) -> None:
    async with await connect(target) as client:
        await remove(client, target.box)


async def check(target: Target, name: str, seconds: float) -> None:
    """Runs one case and sees that it leaves nothing; after a failure, that the next one begins with that."""
    try:
        async with asyncio.timeout(seconds):
            await NAMES[name](target)
            async with await connect(target) as client:
                await nothing_left(target, client)
    except BaseException:
        async with await connect(target) as client, asyncio.timeout(seconds):
            await _clear(target, client)
        raise


async def _clear(target: Target, client: Client) -> None:
    for container in await client.list_containers():
        if container.container != target.box:
            await remove(client, container.container)
            continue
        for process in container.processes[1:]:
            with contextlib.suppress(RpcError):
                await client.kill_process(target.box, process.process, "SIGKILL")
            await client.wait_process(target.box, process.process, deadline=10.0)
            await client.delete_process(target.box, process.process)
