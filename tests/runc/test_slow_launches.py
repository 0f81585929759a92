"""An agent is killed while the runtime is at work, which goes on, and is through when the next one is there.

What is walked step by step (test_fault_points) has a runtime that is faster than any agent's start.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gcsagent.host.client import Client
from gcsagent.host.process import RemoteProcess
from gcsagent.host.spec import exec_spec
from protocol.errors import Code, RpcError
from protocol.families.container import CreateContainer
from protocol.families.process import Exec
from protocol.types import Status
from tests.cases.agents import children, command_line, eventually
from tests.cases.target import (
    PIPES,
    connect,
    creation,
    expect,
    name,
    refused,
    remove,
    run,
    running,
    terminal,
)
from tests.fakes.slow_runc import Slow


@pytest.fixture(autouse=True)
def _nothing_is_held_for_nobody(slow: Slow) -> Iterator[None]:
    before = _descriptors(slow)
    yield
    eventually(lambda: _descriptors(slow) == before)
    assert _descriptors(slow) == before


def _descriptors(slow: Slow) -> int:
    """The supervisor's."""
    return slow.running.holdings().fds[0]


KINDS = {"pipes": PIPES, "terminal": terminal()}
TALK = ("sh", "-c", "echo begun; read line; echo got $line; exit 7")


async def _talks(process: RemoteProcess) -> None:
    """Every byte there and back, once, and its own exit code."""
    out = process.streams["tty" if process.terminal else "stdout"]
    await expect(out, rb"begun\r?\n")
    await (out if process.terminal else process.streams["stdin"]).write(b"word\n")
    await expect(out, rb"(?s).*got word\r?\n")
    assert (await process.wait()).exit_code == 7


@asynccontextmanager
async def _box(slow: Slow) -> AsyncIterator[tuple[Client, str]]:
    async with (
        await connect(slow.target) as client,
        asyncio.timeout(60),
        running(slow.target, client) as init,
    ):
        yield client, init.container


def _gate(slow: Slow, call: str) -> None:
    (slow.directory / "slow").write_text(call)


@pytest.mark.parametrize("fail", [False, True], ids=["through", "failing"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", ["create", "start"])
def test_a_container(slow: Slow, call: str, kind: str, fail: bool) -> None:
    """The host asks again by itself; what failed while nobody was there is tried again."""

    async def body() -> None:
        async with await connect(slow.target) as client, asyncio.timeout(60):
            params = creation(slow.target, name("c"), TALK, stdio=KINDS[kind])
            if call == "create":
                _gate(slow, "create")
                creating = asyncio.ensure_future(client.create_container(params))
                async with slow.killed_during(fail=fail):
                    pass
                await creating
                await client.start_container(params.container)
            else:
                await client.create_container(params)
                _gate(slow, "start")
                starting = asyncio.ensure_future(client.start_container(params.container))
                async with slow.killed_during(fail=fail):
                    pass
                if fail:
                    await _start_undone(client, params, starting)
                    return
                await starting
            async with await RemoteProcess.attach(client, params.container) as init:
                await _talks(init)
            await remove(client, params.container)

    asyncio.run(body())


async def _start_undone(client: Client, params: CreateContainer, starting: asyncio.Future[Any]) -> None:
    """A container that cannot be started is gone, and its name free again."""
    with refused(Code.INTERNAL):
        await starting
    with refused(Code.NOT_FOUND):
        await client.container_state(params.container)
    await client.create_container(replace(params, spec=params.spec))
    await remove(client, params.container)


@pytest.mark.parametrize("fail", [False, True], ids=["through", "failing"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_exec(slow: Slow, kind: str, fail: bool) -> None:
    async def body() -> None:
        async with _box(slow) as (client, box):
            _gate(slow, "exec")
            exec_ = Exec(box, "p", exec_spec(args=TALK, terminal=kind == "terminal"), KINDS[kind])
            asking = asyncio.ensure_future(client.exec_process(exec_))
            async with slow.killed_during(fail=fail):
                pass
            await asking
            async with await RemoteProcess.attach(client, box, "p") as process:
                await _talks(process)
            assert len((await client.container_state(box)).processes) == 2

    asyncio.run(body())


@pytest.mark.parametrize("fail", [False, True], ids=["through", "failing"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_exec_attached_to_before_it_is_there(slow: Slow, kind: str, fail: bool) -> None:
    """As gcsctl and the client do it: streams are asked for together with the process."""

    async def body() -> None:
        async with _box(slow) as (client, box):
            _gate(slow, "exec")
            exec_ = Exec(box, "p", exec_spec(args=TALK, terminal=kind == "terminal"), KINDS[kind])
            asking = asyncio.ensure_future(RemoteProcess.exec(client, exec_))
            async with slow.killed_during(fail=fail):
                pass
            async with await asking as process:
                await _talks(process)

    asyncio.run(body())


def test_one_that_has_ended_before_anybody_knows_of_it(slow: Slow) -> None:
    async def body() -> None:
        async with _box(slow) as (client, box):
            _gate(slow, "exec")
            spec = exec_spec(args=("sh", "-c", "echo out; echo err >&2; exit 3"))
            asking = asyncio.ensure_future(client.exec_process(Exec(box, "p", spec, PIPES)))
            async with slow.killed_during():
                pass
            await asking
            async with await RemoteProcess.attach(client, box, "p") as process:
                done = await process.communicate(b"")
            assert (done.stdout, done.stderr, done.exit.exit_code) == (b"out\n", b"err\n", 3)

    asyncio.run(body())


def test_one_whose_end_is_told_right_behind_its_start(slow: Slow) -> None:
    """The agent has both before it goes on with either."""

    async def body() -> None:
        async with _box(slow) as (client, box):
            _gate(slow, "exec")
            script = "until test -e /go; do :; done; echo out; exit 3"
            exec_ = Exec(box, "p", exec_spec(args=("sh", "-c", script)), PIPES)
            asking = asyncio.ensure_future(client.exec_process(exec_))
            async with slow.killed_during():
                agent = slow.running.agent_pid
                os.kill(agent, signal.SIGSTOP)
            await asyncio.to_thread(eventually, lambda: _claimed(slow, b"/go"))
            assert _claimed(slow, b"/go")
            (slow.running.state_dir / "containers" / box / "root" / "go").touch()
            exits = slow.running.state_dir / "exits"
            assert await asyncio.to_thread(eventually, lambda: list(exits.glob("*.json")))
            os.kill(agent, signal.SIGCONT)
            await asking
            async with await RemoteProcess.attach(client, box, "p") as process:
                done = await process.communicate(b"")
            assert (done.stdout, done.exit.exit_code) == (b"out\n", 3)

    asyncio.run(body())


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


def _claimed(slow: Slow, word: bytes) -> bool:
    """Whether the supervisor waits for a process with that in its command line."""
    lines = Path(f"/proc/{slow.running.pid}/fdinfo").glob("*")
    watched = {line for path in lines for line in _text(path).splitlines()}
    pids = [pid for pid in children(slow.running.pid) if word in command_line(pid)]
    return any(f"Pid:\t{pid}" in watched for pid in pids)


@pytest.mark.parametrize("fail", [False, True], ids=["through", "failing"])
def test_a_deletion(slow: Slow, fail: bool) -> None:
    async def body() -> None:
        async with await connect(slow.target) as client, asyncio.timeout(60):
            params = creation(slow.target, name("c"), ("true",))
            await client.create_container(params)
            await client.start_container(params.container)
            await client.wait_container(params.container)
            _gate(slow, "delete")
            deleting = asyncio.ensure_future(client.delete_container(params.container))
            async with slow.killed_during(fail=fail):
                pass
            record = await deleting
            assert record is not None
            assert record.exit_code == 0
            with refused(Code.NOT_FOUND):
                await client.container_state(params.container)

    asyncio.run(body())


@pytest.mark.parametrize("fail", [False, True], ids=["through", "failing"])
@pytest.mark.parametrize("call", ["create", "exec"])
def test_a_host_that_has_given_up_leaves_nothing(slow: Slow, call: str, fail: bool) -> None:
    """Its deadline passes while one agent is killed and the next one waits for the runtime."""

    async def body() -> None:
        async with _box(slow) as (client, box):
            _gate(slow, call)
            made = name("c")
            asking: asyncio.Future[Any]
            if call == "create":
                params = creation(slow.target, made, ("sleep", "100000"), stdio=terminal())
                asking = asyncio.ensure_future(client.create_container(params))
            else:
                spec = exec_spec(args=("sleep", "100000"), terminal=True)
                asking = asyncio.ensure_future(client.exec_process(Exec(box, "p", spec, terminal())))
            async with slow.killed_during(fail=fail):
                asking.cancel()
                await asyncio.wait([asking])
            if call == "create":
                await _either(client, made)
            await client.kill_container(box, "SIGKILL")
            await client.wait_container(box)

    asyncio.run(body())


async def _either(client: Client, container: str) -> None:
    """It was made, or it was not; in the end it is not there."""
    try:
        while (await client.container_state(container)).status is Status.CREATING:
            await client.ping()
    except RpcError as error:
        assert error.code is Code.NOT_FOUND  # noqa: PT017
    else:
        await remove(client, container)


def test_two_agents_killed_over_one_call(slow: Slow) -> None:
    async def body() -> None:
        async with _box(slow) as (client, box):
            _gate(slow, "exec")
            exec_ = Exec(box, "p", exec_spec(args=TALK, terminal=True), terminal())
            asking = asyncio.ensure_future(client.exec_process(exec_))
            async with slow.killed_during():
                before = (await client.ping()).generation
                os.kill(slow.running.agent_pid, signal.SIGKILL)
                await asyncio.to_thread(slow.running.wait_for_generation, before + 1)
            await asking
            async with await RemoteProcess.attach(client, box, "p") as process:
                await _talks(process)
            assert (await run(client, box, "echo", "alive")).stdout == b"alive\n"

    asyncio.run(body())
