"""Programs run by the supervisor for the agent, and the agent's end of the channel, when all is not well."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gcsagent.agent import calls
from gcsagent.agent.calls import Caller, CannotStart, Outcome
from gcsagent.agent.runc import Runc
from gcsagent.agent.runtime import RuntimeMissing
from gcsagent.agent.supervisor_client import SupervisorError
from gcsagent.common import channel
from tests.cases.descriptors import descriptors, settled_descriptors
from tests.fakes import watched_loop
from tests.fakes.fake_supervisor import FakeSupervisor

ENDED = {"status": 0, "timed_out": False, "pid": 0, "exit": None}


@pytest.fixture
def null() -> Iterator[int]:
    fd = os.open("/dev/null", os.O_RDWR)
    yield fd
    os.close(fd)


def scenario(body: Callable[[FakeSupervisor, Caller], Awaitable[None]]) -> None:
    async def run() -> None:
        before = settled_descriptors()
        supervisor = FakeSupervisor()
        await body(supervisor, Caller(supervisor.client, {"PATH": "/bin"}, "g1"))
        supervisor.close()
        await asyncio.sleep(0)
        assert descriptors() == before

    watched_loop.run(run())


def start(caller: Caller, *argv: str, **extra: Any) -> asyncio.Task[Outcome]:
    return asyncio.get_running_loop().create_task(caller.run(list(argv), 5.0, **extra))


def victim() -> tuple[subprocess.Popen[bytes], int]:
    process = subprocess.Popen(["sleep", "60"])
    return process, os.pidfd_open(process.pid)


def test_the_loops_watcher_sees_a_blocked_loop() -> None:
    async def blocks() -> None:
        time.sleep(watched_loop.LONGEST * 1.1)  # noqa: ASYNC251 - the very thing it is there to see

    with pytest.raises(AssertionError, match="was blocked"):
        watched_loop.run(blocks())


def test_a_call_is_asked_for_answered_and_forgotten() -> None:
    async def body(supervisor: FakeSupervisor, caller: Caller) -> None:
        task = start(caller, "runc", "state")
        ident, arguments = await supervisor.asked("spawn")
        assert (arguments["argv"], arguments["env"], arguments["timeout"]) == (
            ["runc", "state"],
            {"PATH": "/bin"},
            5.0,
        )
        supervisor.answer(ident, {**ENDED, "status": 256 * 3, "timed_out": True})
        outcome = await task
        assert (outcome.status, outcome.timed_out, outcome.stderr) == (3, True, "")
        _, forgotten = await supervisor.asked("forget_call")
        assert forgotten["call"] == arguments["call"]

    scenario(body)


def test_a_program_that_cannot_be_started_says_why() -> None:
    async def body(supervisor: FakeSupervisor, caller: Caller) -> None:
        task = start(caller, "runc")
        ident, _ = await supervisor.asked("spawn")
        supervisor.refuse(ident, "spawn: No such file", 2)
        with pytest.raises(CannotStart, match="runc cannot be started: spawn: No such file") as caught:
            await task
        assert caught.value.errno == 2

    scenario(body)


@pytest.mark.parametrize(
    "errno, says",
    [(0, "spawn: /x/runc: embedded null byte"), (13, "Permission denied")],
)
def test_a_runtime_that_cannot_be_started_says_so_once(tmp_path: Path, errno: int, says: str) -> None:
    async def body(supervisor: FakeSupervisor, caller: Caller) -> None:
        runc = Runc(caller, "/x/runc", str(tmp_path), str(tmp_path / "console"))
        task = asyncio.get_running_loop().create_task(runc.pause("c", 5.0))
        ident, _ = await supervisor.asked("spawn")
        supervisor.refuse(ident, "spawn: /x/runc: embedded null byte", errno)
        with pytest.raises(RuntimeMissing) as caught:
            await task
        assert str(caught.value) == f"/x/runc cannot be started: {says}"

    scenario(body)


def test_a_cancelled_call_is_killed_waited_for_and_what_it_started_ends() -> None:
    process, pidfd = victim()

    async def body(supervisor: FakeSupervisor, caller: Caller) -> None:
        task = start(caller, "runc", "exec")
        ident, arguments = await supervisor.asked("spawn")
        task.cancel()
        _, cancelled = await supervisor.asked("cancel")
        assert cancelled["call"] == arguments["call"]
        assert not task.done()  # not before it is known what became of it
        supervisor.answer(ident, {**ENDED, "status": 9, "pid": process.pid}, (pidfd,))
        with pytest.raises(asyncio.CancelledError):
            await task
        await supervisor.asked("forget_call")

    scenario(body)
    assert process.wait(10) == -signal.SIGKILL
    os.close(pidfd)


def test_a_result_that_comes_too_late_is_cleaned_up_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "SETTLE_SECONDS", 0.01)
    process, pidfd = victim()

    async def body(supervisor: FakeSupervisor, caller: Caller) -> None:
        task = start(caller, "runc", "exec")
        ident, _ = await supervisor.asked("spawn")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        supervisor.answer(ident, {**ENDED, "pid": process.pid}, (pidfd,))
        await supervisor.asked("forget_call")

    scenario(body)
    assert process.wait(10) == -signal.SIGKILL
    os.close(pidfd)


def test_killing_what_has_ended_already_is_no_error() -> None:
    process, pidfd = victim()
    process.kill()
    process.wait()
    calls.kill_and_close(pidfd)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(pidfd)


def test_answers_find_their_requests_in_any_order_and_refusals_are_typed() -> None:
    async def body(supervisor: FakeSupervisor, _caller: Caller) -> None:
        client = supervisor.client
        first, second = client.request("one", {}), client.request("two", {})
        one, two = (await supervisor.asked("one"))[0], (await supervisor.asked("two"))[0]
        supervisor.refuse(two, "two: no", 28)
        supervisor.answer(999, "nobody asked")
        supervisor.answer(one, "yes")
        assert await first == ("yes", [])
        with pytest.raises(SupervisorError, match="two: no") as caught:
            await second
        assert caught.value.errno == 28

    scenario(body)


def test_descriptors_of_answers_nobody_waits_for_are_closed(null: int) -> None:
    async def body(supervisor: FakeSupervisor, _caller: Caller) -> None:
        future = supervisor.client.request("one", {})
        ident, _ = await supervisor.asked("one")
        future.cancel()
        supervisor.answer(ident, None, (null,) * 3)
        supervisor.answer(12345, None, (null,) * 3)
        supervisor.notify("unknown topic", {})
        task = asyncio.get_running_loop().create_task(supervisor.client.call("ping", {}))
        supervisor.answer((await supervisor.asked("ping"))[0], "pong")
        assert await task == "pong"

    scenario(body)


def test_a_slow_supervisor_gets_everything_in_order_with_its_descriptors(null: int) -> None:
    async def body(supervisor: FakeSupervisor, _caller: Caller) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(supervisor.sock)
        for number in range(3000):
            supervisor.client.tell("note", {"number": number, "padding": "x" * 500}, (null,))
        seen: list[int] = []
        async with asyncio.timeout(10):
            while len(seen) < 3000:
                try:
                    received = channel.receive(supervisor.sock)
                except BlockingIOError:
                    await asyncio.sleep(0)
                    continue
                assert received is not None
                (_, _, arguments), fds = received
                assert len(fds) == 1
                channel.close_all(fds)
                seen.append(arguments["number"])
        assert seen == list(range(3000))
        loop.add_reader(supervisor.sock, supervisor._on_readable)

    scenario(body)


@pytest.mark.parametrize("way", ["closed", "rubbish"])
def test_an_agent_without_a_supervisor_is_told_to_end(way: str) -> None:
    async def body(supervisor: FakeSupervisor, _caller: Caller) -> None:
        if way == "closed":
            supervisor._loop.remove_reader(supervisor.sock)
            supervisor.sock.shutdown(2)
        else:
            supervisor.sock.send(b"\xc1")
        async with asyncio.timeout(10):
            await supervisor.lost.wait()

    scenario(body)


def test_everything_is_asked_for_page_by_page() -> None:
    async def body(supervisor: FakeSupervisor, _caller: Caller) -> None:
        task = asyncio.get_running_loop().create_task(supervisor.client.everything("names"))
        for start, page in ((0, ["a", "b"]), (1, ["b", "c"]), (2, ["c"])):
            ident, arguments = await supervisor.asked("list")
            assert arguments == {"kind": "names", "start": start}
            supervisor.answer(ident, page)
        assert await task == ["a", "b", "c"]

    scenario(body)


def test_what_is_released_in_one_turn_is_told_at_once_and_before_what_is_said_later() -> None:
    async def body(supervisor: FakeSupervisor, _caller: Caller) -> None:
        client = supervisor.client
        client.release("a")
        client.release("b", "c")
        client.tell("note", {})
        client.release("d")
        assert (await supervisor.asked("note"))[0] < 0
        assert (await supervisor.asked("release"))[1] == {"names": ["a", "b", "c"]}
        assert (await supervisor.asked("release"))[1] == {"names": ["d"]}

    scenario(body)


def test_a_refusal_of_what_nobody_waits_for_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def body(supervisor: FakeSupervisor, _caller: Caller) -> None:
        supervisor.client.tell("note", {})
        ident, _ = await supervisor.asked("note")
        supervisor.answer(ident, None)  # as an earlier version's supervisor does
        supervisor.refuse(ident, "note: no")
        answered = supervisor.client.call("ping", {})
        task = asyncio.get_running_loop().create_task(answered)
        supervisor.answer((await supervisor.asked("ping"))[0], "pong")
        await task

    scenario(body)
    assert [record.__dict__["error"] for record in caplog.records] == ["note: no"]


@pytest.mark.parametrize("gone", [None, 0, 2, 3, 4])
def test_what_is_listed_page_by_page_is_all_there_even_if_some_of_it_goes_meanwhile(gone: int | None) -> None:
    async def body(supervisor: FakeSupervisor, _caller: Caller) -> None:
        there = [[name, number] for number, name in enumerate("abcde")]
        asking = asyncio.create_task(supervisor.client.everything("processes"))
        pages = 0
        while not asking.done():
            asked = asyncio.create_task(supervisor.asked("list"))
            await asyncio.wait([asked, asking], return_when=asyncio.FIRST_COMPLETED)
            if not asked.done():
                asked.cancel()
                break
            ident, arguments = asked.result()
            supervisor.answer(ident, there[arguments["start"] : arguments["start"] + 3])
            pages += 1
            if gone is not None and pages == 1:
                del there[gone]
        found = await asking
        assert [item for item in found if item in there] == there
        assert len(found) <= 5

    scenario(body)
