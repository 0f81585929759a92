"""Every request in every status of a container: allowed ones are carried out, others refused by name."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from gcsagent.agent.container import ALLOWED, REQUESTS
from gcsagent.host.client import Client
from gcsagent.host.spec import exec_spec
from protocol.errors import Code, RpcError
from protocol.families.archive import GetArchive, PutArchive
from protocol.families.checkpoint import MakeCheckpoint
from protocol.families.container import (
    ContainerRef,
    DeleteContainer,
    KillContainer,
    ListProcesses,
    UpdateContainer,
)
from protocol.families.forward import OpenForward
from protocol.families.network import ApplyNetwork, Interface, NetworkRef
from protocol.families.pod import PodRef, UpdatePod
from protocol.families.process import Exec
from protocol.pods import PodMember, Sandbox
from protocol.schema import to_wire
from protocol.types import Status
from tests.cases.target import connect, creation, name, raw_call, remove
from tests.fakes.slow_runc import Slow

ELSEWHERE = {"archive.put", "archive.get", "forward.open", "container.checkpoint"}
"""Allowed, they need more than this runtime, or a connection of their own; they have tests of their own."""


def _request(slow: Slow, request: str, box: str) -> tuple[str, Any]:
    method, _, how = request.partition(" with ")
    arguments = {
        "container.create": creation(slow.target, name("c"), ("true",), pod=PodMember(box)),
        "pod.update": UpdatePod(box, pids=50),
        "pod.stats": PodRef(box),
        "process.exec": Exec(box, name("p"), {"args": ["true"]}),
        "container.kill": KillContainer(box, "CONT"),
        "container.update": UpdateContainer(box, pids=50),
        "container.processes": ListProcesses(box),
        "archive.put": PutArchive(box),
        "archive.get": GetArchive("/", box),
        "forward.open": OpenForward(box, port=1),
        "network.apply": ApplyNetwork(box, (Interface("lo"),)),
        "network.state": NetworkRef(box),
        "container.checkpoint": MakeCheckpoint(box, name("k"), leave_running=bool(how)),
        "container.delete": DeleteContainer(box, force=how == "force"),
    }
    return method, arguments.get(method, ContainerRef(box))


@contextlib.asynccontextmanager
async def _in_status(slow: Slow, client: Client, status: Status) -> AsyncIterator[str]:
    """A container that has this status for as long as the body runs."""
    params = creation(slow.target, name("c"), ("sleep", "100000"), sandbox=Sandbox())
    box = params.container
    work: list[asyncio.Future[Any]] = []
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(remove, client, box)
        if status is Status.CREATING:
            (slow.directory / "slow").write_text("create")
            work.append(asyncio.ensure_future(client.create_container(params)))
            stack.push_async_callback(asyncio.wait, work)
            await stack.enter_async_context(slow.held())
            yield box
            return
        await client.create_container(params)
        if status is not Status.CREATED:
            await client.start_container(box)
        if status is Status.PAUSED:
            await client.pause_container(box)
        if status in (Status.STOPPED, Status.FAILED, Status.DELETING):
            await client.kill_container(box, "KILL")
            await client.wait_container(box)
        if status in (Status.FAILED, Status.DELETING):
            (slow.directory / "slow").write_text("delete")
            work.append(asyncio.ensure_future(client.delete_container(box)))
            async with slow.held(fail=status is Status.FAILED):
                if status is Status.DELETING:
                    yield box
            await asyncio.wait(work)
            if status is Status.DELETING:
                return
        yield box


async def _every_request(slow: Slow, status: Status) -> None:
    async with await connect(slow.target) as client, asyncio.timeout(100):
        async with _in_status(slow, client, status) as box:
            for request, (action, _) in REQUESTS.items():
                if status not in ALLOWED[action]:
                    await _refused(slow, request, box, status)
            assert (await client.container_state(box)).status is status
        for request, (action, leads_to) in REQUESTS.items():
            if status in ALLOWED[action] and request.partition(" with ")[0] not in ELSEWHERE:
                await _carried_out(slow, client, request, status, leads_to)


async def _refused(slow: Slow, request: str, box: str, status: Status) -> None:
    method, params = _request(slow, request, box)
    with pytest.raises(RpcError, match=f"it is {status.value}") as caught:
        await raw_call(slow.target, method, to_wire(params))
    assert (caught.value.code, caught.value.details["status"]) == (Code.FAILED_PRECONDITION, status.value)


async def _carried_out(
    slow: Slow, client: Client, request: str, status: Status, leads_to: Status | None
) -> None:
    async with _in_status(slow, client, status) as box:
        asking = asyncio.ensure_future(client.call(*_request(slow, request, box)))
        if status is not Status.DELETING:
            await asking
        if leads_to is not Status.DELETING:
            assert (await client.container_state(box)).status is (leads_to or status)
    await asking
    if leads_to is Status.DELETING:
        with pytest.raises(RpcError) as caught:
            await client.container_state(box)
        assert caught.value.code is Code.NOT_FOUND


@pytest.mark.parametrize("status", Status)
def test_every_request_in_this_status(slow: Slow, status: Status) -> None:
    asyncio.run(_every_request(slow, status))


def test_a_signal_to_an_exec_that_is_not_there_yet_or_no_more(slow: Slow) -> None:
    async def kill(client: Client, box: str, message: str) -> str:
        with pytest.raises(
            RpcError, match=f"^FAILED_PRECONDITION: process p of container {box} {message}$"
        ) as caught:
            await client.kill_process(box, "p", "KILL")
        return str(caught.value.details["status"])

    async def body() -> None:
        async with (
            await connect(slow.target) as client,
            asyncio.timeout(60),
            _in_status(slow, client, Status.RUNNING) as box,
        ):
            (slow.directory / "slow").write_text("exec")
            launching = asyncio.ensure_future(client.exec_process(Exec(box, "p", exec_spec(args=("true",)))))
            async with slow.held():
                assert await kill(client, box, "is still being created") == Status.CREATING
            await launching
            await client.wait_process(box, "p")
            assert await kill(client, box, "has already ended") == Status.STOPPED

    asyncio.run(body())
