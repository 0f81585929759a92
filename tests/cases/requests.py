"""Cases about requests: the same twice, cancelled, past their deadline, unknown, too many, side by side."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from protocol.errors import Code, RpcError
from protocol.families.container import CreateContainer
from protocol.families.process import Exec
from protocol.limits import MAX_IN_FLIGHT
from protocol.types import Stdio
from tests.cases.target import (
    OUTPUT,
    STREAM,
    Target,
    case,
    connect,
    created,
    creation,
    executing,
    expect,
    name,
    nothing_left,
    raw_answers,
    raw_call,
    refused,
    remove,
    run,
    running,
)

WAITS = ["python3", "-c", "import signal; signal.pause()"]


def hanging(target: Target) -> CreateContainer:
    """A create that does not end by itself: its spec has a hook that sleeps."""

    def with_hook(spec: dict[str, Any]) -> None:
        spec["hooks"] = {"createRuntime": [{"path": "/usr/bin/python3", "args": WAITS}]}

    return creation(target, name("c"), ("true",), spec=with_hook, stdio=OUTPUT)


@case
async def ping_and_info_say_who_is_there(target: Target) -> None:
    async with await connect(target) as client:
        pong, info = await client.ping(), await client.info()
        assert client.welcome is not None
        assert pong.generation == info.generation == client.welcome.generation >= 1
        assert info.boot_id == client.welcome.boot_id
        assert info.agent_version == client.welcome.agent_version
        assert pong.uptime_ms > 0
        assert 0 <= pong.loop_lag_us < 1_000_000 * target.pace
        assert info.runtime == info.runtimes[0]
        runtime = target.runtime or info.runtime.name
        shown = {about.name: about.version for about in info.runtimes}
        assert shown[runtime].startswith(f"{runtime} version ")
        assert (await client.container_state(target.box)).runtime == runtime
        assert info.cgroups in ("v1", "v2", "hybrid")
        assert (info.containers, info.processes) == (1, 1)
        assert info.agent_pid > 0 < info.supervisor_pid != info.agent_pid
        assert 0 < info.memory_available_kib < info.memory_total_kib
        assert info.cpus >= 1
        assert info.uptime_ms > pong.uptime_ms
        kernel = (await run(client, target.box, "uname", "-r")).stdout.decode().strip()
        assert info.kernel == kernel


@case
async def info_counts_live_processes(target: Target) -> None:
    async with await connect(target) as client, executing(client, target.box, "true") as ended:
        await ended.wait()
        assert (await client.info()).processes == 1


@case
async def an_unknown_method_is_unimplemented_and_the_connection_goes_on(target: Target) -> None:
    for method in ("no.such", "__class__", "agent.", ""):
        with refused(Code.UNIMPLEMENTED):
            await raw_call(target, method, {})
    first = await raw_answers(target, [("no.such", {}), ("container.list", {})])
    assert first.msgid == 100


@case
async def a_ping_overtakes_two_hundred_waits(target: Target) -> None:
    async with await connect(target) as client:
        waits = [asyncio.ensure_future(client.wait_container(target.box)) for _ in range(200)]
        await client.ping()
        began = time.monotonic()
        pong = await client.ping()
        assert time.monotonic() - began < 0.5 * target.pace
        assert pong.loop_lag_us < 500_000 * target.pace
        assert not any(wait.done() for wait in waits)
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)


@case
async def one_request_too_many_is_an_error_of_that_request(target: Target) -> None:
    waits = [("container.wait", {"container": target.box})] * MAX_IN_FLIGHT
    first = await raw_answers(target, [*waits, ("agent.ping", {})])
    assert first.msgid == 100 + MAX_IN_FLIGHT
    assert first.error is not None
    assert first.error["code"] == Code.RESOURCE_EXHAUSTED


@case
async def slow_creates_hold_up_nobody(target: Target) -> None:
    async with await connect(target) as client:
        slow = [asyncio.ensure_future(client.create_container(hanging(target))) for _ in range(4)]
        try:
            done = await run(client, target.box, "echo", "meanwhile")
            assert done.stdout == b"meanwhile\n"
            assert not any(create.done() for create in slow)
        finally:
            for create in slow:
                create.cancel()
            await asyncio.gather(*slow, return_exceptions=True)
        await _gone(client, target)


@case
async def the_same_request_joins_or_returns_the_stored_answer(target: Target) -> None:
    async with await connect(target) as client, await connect(target) as other:
        params, request = creation(target, name("c"), ("sleep", "100000")), name("r")
        try:
            both = await asyncio.gather(
                client.create_container(params, request_id=request),
                other.create_container(params, request_id=request, deadline=30 * target.pace),
            )
            later = await other.create_container(params, request_id=request)
            assert [created.pid for created in (*both, later)] == [both[0].pid] * 3
            different = creation(target, params.container, ("true",))
            with refused(Code.ALREADY_EXISTS):
                await client.create_container(different, request_id=request)
            with refused(Code.ALREADY_EXISTS):
                await client.exec_process(Exec(params.container, "p", {"args": ["true"]}), request_id=request)
        finally:
            await remove(client, params.container)


@case
async def a_repeated_exec_runs_once(target: Target) -> None:
    script = "read x; echo ran >>/tmp/ran; cat /tmp/ran"
    async with await connect(target) as client, await connect(target) as other:
        stdio = Stdio(STREAM, STREAM)
        params, request = Exec(target.box, name("p"), {"args": ["sh", "-c", script]}, stdio), name("r")
        first = await client.exec_process(params, request_id=request)
        assert await other.exec_process(params, request_id=request) == first
        await client.close_stdin(target.box, params.process)
        await client.wait_process(target.box, params.process)
        assert await other.exec_process(params, request_id=request) == first
        async with await client.attach(target.box, params.process) as out:
            out.finish_at(4)
            assert await expect(out, b"ran\n") == b"ran\n"
        record = await client.delete_process(target.box, params.process)
        assert record is not None
        assert record.streams["stdout"] == 4
        await run(client, target.box, "rm", "/tmp/ran")


@case
async def a_cancelled_create_leaves_nothing(target: Target) -> None:
    async with await connect(target) as client:
        params = hanging(target)
        creating = asyncio.ensure_future(client.create_container(params))
        await _appears(client, params.container)
        creating.cancel()
        await asyncio.gather(creating, return_exceptions=True)
        await _gone(client, target)
        async with running(target, client, "true") as init:  # and things go on
            assert (await init.wait()).exit_code == 0


@case
async def a_create_past_its_deadline_leaves_nothing(target: Target) -> None:
    async with await connect(target) as client:
        params = hanging(target)
        began = time.monotonic()
        with refused(Code.DEADLINE_EXCEEDED):
            await client.create_container(params, deadline=0.7 * target.pace)
        assert 0.7 * target.pace <= time.monotonic() - began < 5 * target.pace
        with refused(Code.NOT_FOUND):
            await client.container_state(params.container)
        await nothing_left(target, client)


@case
async def an_exec_past_its_deadline_leaves_nothing(target: Target) -> None:
    async with await connect(target) as client:
        for deadline in (0.001, 0.002):  # crun may need no more than 5 ms
            params = Exec(target.box, name("p"), {"args": ["sleep", "100000"]}, OUTPUT)
            with refused(Code.DEADLINE_EXCEEDED):
                await client.exec_process(params, deadline=deadline)
            with refused(Code.NOT_FOUND):
                await client.process_state(target.box, params.process)
        await nothing_left(target, client)


@case
async def a_cancelled_exec_leaves_nothing(target: Target) -> None:
    async with await connect(target) as client:
        params = Exec(target.box, name("p"), {"args": ["sleep", "100000"]}, OUTPUT)
        executing = asyncio.ensure_future(client.exec_process(params))
        while not executing.done():
            try:
                await client.process_state(target.box, params.process)
            except RpcError:
                continue
            break
        executing.cancel()
        await asyncio.gather(executing, return_exceptions=True)
        await _gone(client, target)


@case
async def a_wait_past_its_deadline_ends_alone(target: Target) -> None:
    async with await connect(target) as client:
        with refused(Code.DEADLINE_EXCEEDED):
            await client.wait_container(target.box, deadline=0.05)
        await client.ping()


@case
async def wrong_arguments_name_their_field(target: Target) -> None:
    async with await connect(target) as client, created(target, client) as init:
        process = {"container": init.container, "process": "p"}
        for method, params, field in (
            ("process.exec", {**process, "spec": {}}, "spec.args"),
            ("process.exec", {**process, "spec": {"args": []}}, "spec.args"),
            ("process.exec", {**process, "spec": {"args": ["x\0"]}}, "spec.args[0]"),
            ("process.exec", {**process, "spec": {"args": ["x"], "env": ["no"]}}, "spec.env[0]"),
            (
                "process.exec",
                {**process, "spec": {"args": ["x"]}, "stdio": {"terminal": 1}},
                "stdio.terminal",
            ),
            (
                "process.exec",
                {**process, "spec": {"args": ["x"]}, "stdio": {"tty": {"mode": "stream"}}},
                "stdio",
            ),
            ("process.resize", {**process, "winsize": {"rows": 70000}}, "winsize.rows"),
            ("container.kill", {"container": init.container, "signal": 65}, "signal"),
            ("container.create", {"container": "c"}, "spec"),
            ("container.create", {"container": "c", "spec": {}, "bundle": "/x"}, "spec"),
            ("container.create", {"container": "c", "bundle": "relative"}, "bundle"),
            ("container.wait", {"container": init.container, "deadline_ms": 0}, "deadline_ms"),
        ):
            with refused(Code.INVALID_ARGUMENT, field=field):
                await raw_call(target, method, params)


async def _appears(client: Any, container: str) -> None:
    """Until the agent has begun with it; it is asked, as there is no event before it is created."""
    async with asyncio.timeout(30):
        while True:
            try:
                await client.container_state(container)
            except RpcError:
                continue
            return


async def _gone(client: Any, target: Target) -> None:
    """Until what was cancelled has been cleared away; the cancelled have no answer to wait for."""
    async with asyncio.timeout(20):
        while True:
            try:
                await nothing_left(target, client)
            except AssertionError:
                await client.ping()
                continue
            return
