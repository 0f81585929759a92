"""A runtime with a fault (tests/fakes/fake_runc.py): one typed error, nothing left, all well afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from gcsagent.host.client import Client
from gcsagent.host.errors import ClosedByPeer
from gcsagent.host.process import RemoteProcess
from protocol.errors import Code, RpcError
from protocol.families.container import ContainerRef, DeleteContainer, UpdateContainer
from protocol.families.process import Exec
from protocol.types import Status, Stdio
from tests.cases.agents import RunningAgent, eventually, stopped_clean
from tests.cases.target import (
    OUTPUT,
    Target,
    connect,
    creation,
    name,
    refused,
    remove,
    run,
    running,
    terminal,
)

FAKE = Path(__file__).parents[1] / "fakes" / "fake_runc.py"
GROWTH_KIB = 4096
SOON = 0.4
"""Seconds: the deadline of what hangs. The real runtime takes a tenth of that."""

PATIENCE = 50.0
AT_ONCE = 6
LARGE = {"log huge-line", "log many-lines", "log binary", "flood"}
ENDED = ["container.created", "process.exited", "container.stopped", "container.deleted"]


@dataclass(frozen=True, slots=True)
class Bench:
    """An agent whose runtime does what it is told."""

    agent: RunningAgent
    target: Target
    runtime: Path

    @contextlib.contextmanager
    def fault(self, command: str, what: str, words: str) -> Iterator[None]:
        """That ``command`` goes wrong for this container (an exec: process), and only while this lasts."""
        path = self.runtime.parent / "faults" / f"{command}.{what}"
        path.write_text(words)
        try:
            yield
        finally:
            path.unlink()

    def cgroup(self, container: str) -> list[str]:
        """Pids in its cgroup, in every hierarchy."""
        found = {
            pid
            for path in self.agent.cgroups()
            if path.endswith(f"/{container}")
            for pid in Path(path, "cgroup.procs").read_text().split()
        }
        return sorted(found)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory, rootfs: str) -> Iterator[Bench]:
    """One agent goes through all faults: what one leaves would meet the next."""
    runtime = tmp_path_factory.mktemp("runtime") / "runc"
    (runtime.parent / "faults").mkdir()
    shutil.copy(FAKE, runtime)
    runtime.chmod(0o755)
    for agent in stopped_clean(RunningAgent("--log-level", "debug", "--runtime", str(runtime))):
        yield Bench(agent, Target(agent.address, rootfs, box="", pace=2.0, execs=1), runtime)


@pytest.fixture
def bench(faulty: Bench) -> Iterator[Bench]:
    """Afterwards it holds what it held before."""
    before = faulty.agent.holdings()
    yield faulty
    faulty.agent.assert_holds(before)


def go(body: Callable[[Client], Awaitable[None]], bench: Bench) -> None:
    async def connected() -> None:
        async with asyncio.timeout(PATIENCE), await connect(bench.target) as client:
            try:
                await body(client)
            finally:
                for container in await client.list_containers():
                    await remove(client, container.container)

    asyncio.run(connected())


# -- one fault, one command -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fault:
    """``says`` are words of the error's sentence; ``details`` are among its details."""

    words: str
    code: Code = Code.INTERNAL
    says: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    stdio: Stdio = Stdio()


ANY_COMMAND = [
    Fault("exit 1", says="ended with status 1 and gave no reason", details={"exit_status": 1}),
    Fault("signal SIGSEGV", says="killed by SIGSEGV", details={"exit_status": -11}),
    Fault("signal SIGKILL", says="killed by SIGKILL", details={"exit_status": -9}),
    Fault("log binary", says="ended with status 1"),
    Fault("log huge-line", says="ended with status 1"),
    Fault("log deep", says="ended with status 1"),
    Fault("log many-lines", says="at the very end", details={"runtime_error": "at the very end"}),
    Fault("log stale-success", says="the cause", details={"runtime_error": "the cause"}),
    Fault("log surrogate", says="half ? of a pair"),
    Fault("log no-object", says="{'a': 'map'}"),
    Fault("log lines", says="first line second line"),
    Fault("log long-words", says="many words many words"),
    Fault("log-is fifo", says="ended with status 1"),
    Fault("log-is directory", says="ended with status 1"),
    Fault("children", says="children live on"),
    Fault("hang", Code.DEADLINE_EXCEEDED, "and was killed", {"runtime_error": "about to hang"}),
    Fault("hang children", Code.DEADLINE_EXCEEDED, "and was killed", {"runtime_error": "about to hang"}),
    Fault("done-then exit:4", details={"exit_status": 4}),
    Fault("done-then signal:SIGKILL", details={"exit_status": -9}),
    Fault("done-then hang", Code.DEADLINE_EXCEEDED, "and was killed"),
]

LAUNCHES = [
    Fault("nothing", says="reported success, but pid file", details={"exit_status": 0}),
    Fault("no-pid-file", says="No such file"),
    Fault("pid rubbish", says="'rubbish' is no pid"),
    Fault("pid -1", says="'-1' is no pid"),
    Fault("pid 0", says="'0' is no pid"),
    Fault("pid 1", says="process 1 named by the pid file is not our child"),
    Fault(f"pid {os.getpid()}", says="is not our child"),
    Fault("pid 99999999999", says="is no pid"),
    Fault("pid dead", says="is not our child"),
    Fault(
        "stderr", says="the last line", details={"stderr": "some words\nruntime: the last line"}, stdio=OUTPUT
    ),
    Fault("flood", Code.DEADLINE_EXCEEDED, "and was killed", stdio=OUTPUT),
    Fault("flood", says="ended with status 1"),
    Fault("stderr", says="the last line", details={"exit_status": 3}, stdio=terminal()),
    Fault("console never", says="no terminal", stdio=terminal()),
    Fault("console closed", says="no terminal", stdio=terminal()),
    Fault("console bytes", says="no terminal", stdio=terminal()),
    Fault("console file", says="is no terminal", stdio=terminal()),
    Fault("nothing", says="reported success, but pid file", stdio=terminal()),
    Fault("done-then exit:4", details={"exit_status": 4}, stdio=terminal()),
    Fault("done-then exit:4", details={"exit_status": 4}, stdio=OUTPUT),
]

OTHERS = [
    Fault("stderr", says="the last line", details={"stderr": "some words\nruntime: the last line"}),
    Fault("flood", says="nobody takes it"),
]
"""Of commands whose standard error is ours."""


async def fails(request: Awaitable[object], fault: Fault) -> RpcError:
    """``request`` must end with exactly this fault's error."""
    with pytest.raises(RpcError) as caught:
        await request
    error = caught.value
    assert error.code is fault.code, (error, error.details)
    assert fault.says in error.message
    assert "\n" not in error.message
    assert len(error.message) < 2000
    assert sum(len(str(value)) for value in error.details.values()) < 10_000
    assert {key: error.details.get(key) for key in fault.details} == fault.details
    assert "problem" not in error.details
    return error


async def becomes(look: Callable[[], object], wanted: object) -> None:
    """For facts that no event tells of, such as a process having been reaped."""
    await asyncio.to_thread(eventually, lambda: look() == wanted)
    assert look() == wanted


async def gone(client: Client, container: str) -> None:
    with refused(Code.NOT_FOUND):
        await client.container_state(container)


def deadline_for(fault: Fault) -> float | None:
    return SOON if fault.code is Code.DEADLINE_EXCEEDED else None


async def each(faults: list[Fault], attempt: Callable[[Fault], Awaitable[None]]) -> None:
    """All of them on one agent, a few at a time: one's trouble is not to be another's."""
    room = asyncio.Semaphore(AT_ONCE)

    async def one(fault: Fault) -> None:
        async with room:
            try:
                await attempt(fault)
            except BaseException as error:
                error.add_note(f"the fault was {fault}")
                raise

    async with asyncio.TaskGroup() as tasks:
        for fault in faults:
            tasks.create_task(one(fault))


def test_create(bench: Bench) -> None:
    """Nothing is left, and the id can be used again at once."""

    async def body(client: Client) -> None:
        async def attempt(fault: Fault) -> None:
            params = creation(bench.target, name("c"), ("true",), stdio=fault.stdio)
            with bench.fault("create", params.container, fault.words):
                await fails(client.create_container(params, deadline=deadline_for(fault)), fault)
            await gone(client, params.container)
            await client.create_container(params)
            await client.delete_container(params.container, force=True)

        await each([*ANY_COMMAND, *LAUNCHES], attempt)

    go(body, bench)


def test_start(bench: Bench) -> None:
    """A container that could not be started is gone, and whoever looks on is told so."""

    async def body(client: Client) -> None:
        async def attempt(fault: Fault) -> None:
            params = creation(bench.target, name("c"), ("sleep", "100000"), stdio=OUTPUT)
            async with await client.events(container=params.container) as events:
                init = await RemoteProcess.create(client, params)
                waiting = asyncio.create_task(client.wait_container(params.container))
                where = ContainerRef(params.container)
                with bench.fault("start", params.container, fault.words):
                    await fails(client.call("container.start", where, deadline=deadline_for(fault)), fault)
                await gone(client, params.container)
                assert (await waiting).signal == 9
                for stream in init.outputs:
                    with contextlib.suppress(ClosedByPeer):
                        assert await stream.read() == b""
                told: list[str] = []
                while told[-1:] != ["container.deleted"]:
                    told.append((await anext(events)).type)
                told = [kind for kind in told if kind != "stream.end"]
                assert told == ENDED
                init.detach()

        await each([*ANY_COMMAND, *OTHERS], attempt)
        params = creation(bench.target, name("c"), ("sh", "-c", "exit 7"))
        with bench.fault("start", params.container, "exit 1"):
            await client.create_container(params)
            await fails(client.start_container(params.container), ANY_COMMAND[0])
        await client.create_container(params)
        await client.start_container(params.container)
        assert (await client.wait_container(params.container)).exit_code == 7
        await client.delete_container(params.container)

    go(body, bench)


def test_exec(bench: Bench) -> None:
    """The container runs on, with no process in it that was not there before."""

    async def body(client: Client) -> None:
        async with running(bench.target, client) as box:
            before = bench.cgroup(box.container)
            assert before

            async def attempt(fault: Fault) -> None:
                spec = {"args": ["sleep", "100000"], "cwd": "/"}
                params = Exec(box.container, name("p"), spec, fault.stdio)
                with bench.fault("exec", params.process, fault.words):
                    await fails(client.exec_process(params, deadline=deadline_for(fault)), fault)
                with refused(Code.NOT_FOUND):
                    await client.process_state(box.container, params.process)

            await each([*ANY_COMMAND, *LAUNCHES], attempt)
            await becomes(lambda: bench.cgroup(box.container), before)
            params = Exec(box.container, "p", {"args": ["sh", "-c", "exit 7"], "cwd": "/"})
            with bench.fault("exec", "p", "exit 1"):
                await fails(client.exec_process(params), ANY_COMMAND[0])
            await client.exec_process(params)
            assert (await client.wait_process(box.container, "p")).exit_code == 7

    go(body, bench)


def test_pause_resume_and_update(bench: Bench) -> None:
    """The container is what it was before, and the same request succeeds once the runtime does."""
    settled = {"done-then exit:4", "done-then signal:SIGKILL", "done-then hang"}
    common = [fault for fault in ANY_COMMAND if fault.words not in settled]

    async def body(client: Client) -> None:
        async def attempt(fault: Fault) -> None:
            async with running(bench.target, client) as box:
                where = ContainerRef(box.container)
                limits = UpdateContainer(box.container, pids=50)
                for command, params in (("pause", where), ("resume", where), ("update", limits)):
                    if (command, fault.words) == ("update", "nothing"):
                        continue  # that limits were not set is not looked at
                    status = (await client.container_state(box.container)).status
                    with bench.fault(command, box.container, fault.words):
                        call = client.call(f"container.{command}", params, deadline=deadline_for(fault))
                        await fails(call, fault)
                    assert (await client.container_state(box.container)).status is status
                    await client.call(f"container.{command}", params)
                assert (await run(client, box.container, "echo", "alive")).stdout == b"alive\n"

        await each([*common, Fault("nothing", says="reported success, and the container")], attempt)

    go(body, bench)


def test_delete(bench: Bench) -> None:
    """What the runtime does not clean up stays visible, as FAILED; with a sound one it can be deleted."""
    left = [fault for fault in ANY_COMMAND if not fault.words.startswith("done")]
    nothing = Fault("nothing", says="delete: it left ", details={"exit_status": 0})

    async def body(client: Client) -> None:
        async def attempt(fault: Fault) -> None:
            params = creation(bench.target, name("c"), ("sleep", "100000"))
            await client.create_container(params)
            await client.start_container(params.container)
            force = DeleteContainer(params.container, force=True)
            with bench.fault("delete", params.container, fault.words):
                await fails(client.call("container.delete", force, deadline=deadline_for(fault)), fault)
                state = await client.container_state(params.container)
                assert state.status is Status.FAILED
                assert state.problem
                assert not bench.cgroup(params.container)
                with refused(Code.FAILED_PRECONDITION):
                    await client.start_container(params.container)
            record = await client.delete_container(params.container, force=True)
            assert record is not None
            assert record.signal == 9
            await gone(client, params.container)

        await each([*left, *OTHERS, nothing], attempt)

    go(body, bench)


def test_a_create_that_cannot_be_undone_says_so(bench: Bench) -> None:
    async def body(client: Client) -> None:
        params = creation(bench.target, name("c"), ("sleep", "100000"))
        with (
            bench.fault("create", params.container, "done-then exit:4"),
            bench.fault("delete", params.container, "exit 5"),
        ):
            with pytest.raises(RpcError) as caught:
                await client.create_container(params)
            state = await client.container_state(params.container)
        assert caught.value.details["exit_status"] == 4
        assert caught.value.details["problem"] == state.problem
        assert "status 5" in state.problem
        assert state.status is Status.FAILED
        assert not bench.cgroup(params.container)
        await client.delete_container(params.container, force=True)

    go(body, bench)


@pytest.mark.parametrize("damage", ["cut", "empty", "rubbish", "shape", "gone"])
def test_a_state_the_runtime_cannot_read_any_more(bench: Bench, damage: str) -> None:
    async def body(client: Client) -> None:
        params = creation(bench.target, name("c"), ("sleep", "100000"), stdio=OUTPUT)
        with bench.fault("create", params.container, f"break-state {damage}"):
            await client.create_container(params)
        with pytest.raises(RpcError) as caught:
            await client.start_container(params.container)
        assert caught.value.details["runtime_error"]
        assert "problem" not in caught.value.details
        await gone(client, params.container)
        await client.create_container(params)
        await client.delete_container(params.container, force=True)

    go(body, bench)


BINARIES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "No such file or directory; install it in the guest"),
    "not executable": (lambda path: shutil.copy(FAKE, path), "Permission denied; make it an executable file"),
    "a directory": (lambda path: path.mkdir(), "Permission denied; make it an executable file"),
    "empty": (lambda path: _executable(path, b""), "Exec format error; it is no program for this machine"),
    "text": (lambda path: _executable(path, b"exit 0\n"), "Exec format error; it is no program"),
    "for another machine": (
        lambda path: _executable(path, b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\0\xb7\0" + bytes(200)),
        "Exec format error; it is no program",
    ),
    "of a missing interpreter": (
        lambda path: _executable(path, b"#!/nowhere/python\n"),
        "No such file or directory; install it in the guest",
    ),
}


def _executable(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    path.chmod(0o755)


@pytest.mark.parametrize("binary", BINARIES)
def test_a_binary_that_cannot_be_started(bench: Bench, binary: str) -> None:
    make, says = BINARIES[binary]
    whole = bench.runtime.with_name("whole")

    async def body(client: Client) -> None:
        one, two = [creation(bench.target, name("c"), ("sleep", "100000")) for _ in range(2)]
        await client.create_container(one)
        await client.create_container(two)
        await client.start_container(one.container)
        here, there = ContainerRef(one.container), ContainerRef(two.container)
        spec = {"args": ["true"], "cwd": "/"}
        bench.runtime.rename(whole)
        try:
            make(bench.runtime)
            for method, params in (
                ("container.create", creation(bench.target, name("c"), ("true",))),
                ("process.exec", Exec(one.container, "p", spec)),
                ("container.pause", here),
                ("container.update", UpdateContainer(one.container, pids=50)),
                ("container.start", there),
                ("container.delete", DeleteContainer(one.container, force=True)),
            ):
                with pytest.raises(RpcError) as caught:
                    await client.call(method, params)
                assert caught.value.code is Code.UNAVAILABLE, (method, caught.value)
                assert caught.value.message.count("cannot be started") == 1
                assert f"{bench.runtime} cannot be started: {says}" in caught.value.message
                assert caught.value.details["errno"] > 0
            states = {state.container: state for state in await client.list_containers()}
            assert {ident: state.status for ident, state in states.items()} == {
                one.container: Status.FAILED,
                two.container: Status.FAILED,
            }
            assert not bench.cgroup(one.container) + bench.cgroup(two.container)
            assert (await client.info()).runtime.version  # it says that there is none
        finally:
            bench.runtime.rmdir() if bench.runtime.is_dir() else bench.runtime.unlink(missing_ok=True)
            whole.rename(bench.runtime)
        for params in (one, two):
            await client.delete_container(params.container, force=True)

    go(body, bench)


def test_none_of_it_has_made_the_agent_grow(bench: Bench) -> None:
    """Tens of megabytes of log and standard error at a time."""

    async def body(client: Client) -> None:
        async def attempt(fault: Fault) -> None:
            params = creation(bench.target, name("c"), ("true",))
            await client.create_container(params)
            with bench.fault("start", params.container, fault.words):
                await fails(client.start_container(params.container), fault)

        large = [fault for fault in (*ANY_COMMAND, *OTHERS) if fault.words in LARGE]
        assert len(large) == len(LARGE)
        await each(large, attempt)
        before = bench.agent.memory_kib()
        await each(large * 4, attempt)
        grown = [after - then for then, after in zip(before, bench.agent.memory_kib(), strict=True)]
        assert max(grown) < GROWTH_KIB, f"supervisor and agent grew by {grown} KiB"

    go(body, bench)
