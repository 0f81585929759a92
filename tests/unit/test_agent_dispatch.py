"""Requests on their way: once only, within their deadline, cancelled only before the commit point."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from gcsagent.agent.call import Call
from gcsagent.agent.dispatch import Dispatcher
from gcsagent.agent.journal import MAX_STORED, UNDONE, Journal, RequestMark
from gcsagent.agent.logs import context
from gcsagent.agent.runtime import RuntimeFailure
from gcsagent.agent.supervisor_client import SupervisorError
from protocol.errors import Code, RpcError
from protocol.families.container import Created
from protocol.method import Envelope
from tests.fakes import watched_loop

Handler = Callable[[Any, Call], Any]
METHOD = "container.start"  # a mutating one


class Desk:
    """A dispatcher whose one handler the test gives, and every answer it gave."""

    def __init__(self, state: Path, handler: Handler) -> None:
        self.journal = Journal(str(state))
        self.stopping = False
        table = {METHOD: handler, "container.state": handler}
        self.dispatcher = Dispatcher(table, self.journal, lambda: self.stopping)
        self.answers: list[Any] = []
        self.runs = 0

    def ask(
        self,
        raw: dict[str, Any] | None = None,
        *,
        request: str | None = None,
        deadline: int | None = 10_000,
        method: str = METHOD,
    ) -> Call:
        call = Call(method, deadline, context(logging.getLogger("test")))
        self.dispatcher.run(call, raw or {}, None, Envelope(request_id=request), self.answers.append)
        return call

    async def answered(self, count: int = 1) -> list[Any]:
        async with asyncio.timeout(10):
            while len(self.answers) < count:  # noqa: ASYNC110 - handlers run in this loop
                await asyncio.sleep(0)
        return self.answers


def at_desk(tmp_path: Path, handler: Handler, body: Callable[[Desk], Awaitable[None]]) -> None:
    async def scenario() -> None:
        await body(Desk(tmp_path, handler))

    watched_loop.run(scenario())


class Gate:
    """A handler that waits at a gate, then answers with how often it has been run."""

    def __init__(self, commit: bool = False) -> None:
        self.runs, self.undone = 0, 0
        self.commit = commit
        self.open = asyncio.Event()

    async def __call__(self, _params: Any, call: Call) -> Created:
        self.runs += 1
        run = self.runs
        if self.commit:
            call.commit()
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.undone += 1
            raise
        return Created(run)


def gated(tmp_path: Path, body: Callable[[Desk, Gate], Awaitable[None]], commit: bool = False) -> None:
    async def scenario() -> None:
        gate = Gate(commit)

        async def handler(params: Any, call: Call) -> Created:
            return await gate(params, call)

        await body(Desk(tmp_path, handler), gate)

    watched_loop.run(scenario())


# -- once -------------------------------------------------------------------------------------------


def test_the_same_request_joins_the_one_in_flight_and_is_answered_from_store_afterwards(
    tmp_path: Path,
) -> None:
    async def body(desk: Desk, gate: Gate) -> None:
        desk.ask({"container": "c"}, request="r")
        desk.ask({"container": "c", "deadline_ms": 5}, request="r")  # the deadline is not part of it
        await asyncio.sleep(0)
        gate.open.set()
        first, second = await desk.answered(2)
        assert first == second == Created(1)
        desk.ask({"container": "c"}, request="r")
        stored = (await desk.answered(3))[2]
        assert stored in (Created(1), {"pid": 1})
        assert gate.runs == 1

    gated(tmp_path, body)


def test_the_same_id_for_another_request_is_refused(tmp_path: Path) -> None:
    async def body(desk: Desk, gate: Gate) -> None:
        desk.ask({"container": "c"}, request="r")
        desk.ask({"container": "d"}, request="r")
        (refusal,) = desk.answers
        assert refusal.code is Code.ALREADY_EXISTS
        gate.open.set()
        await desk.answered(2)
        desk.ask({"container": "d"}, request="r")
        assert (await desk.answered(3))[2].code is Code.ALREADY_EXISTS
        desk.ask({"container": "d"}, request="s")
        assert (await desk.answered(4))[3] == Created(2)

    gated(tmp_path, body)


def test_nothing_is_begun_while_the_agent_goes_down(tmp_path: Path) -> None:
    async def handler(_params: Any, _call: Call) -> Created:
        return Created(1)

    async def body(desk: Desk) -> None:
        desk.stopping = True
        desk.ask(request="r")
        (refusal,) = await desk.answered()
        assert refusal.code is Code.UNAVAILABLE
        assert desk.journal.find("r") is None
        desk.ask(method="container.state")
        assert (await desk.answered(2))[1] == Created(1)
        call = Call("forward.open", 1000, context(logging.getLogger("test")))
        desk.dispatcher.open(call, None, desk.answers.append)
        assert (await desk.answered(3))[2].code is Code.UNAVAILABLE

    at_desk(tmp_path, handler, body)


def test_an_error_is_not_stored_so_the_request_can_be_tried_again(tmp_path: Path) -> None:
    runs = 0

    async def handler(_params: Any, _call: Call) -> Created:
        nonlocal runs
        runs += 1
        if runs == 1:
            raise RpcError(Code.UNAVAILABLE, "not now")
        return Created(runs)

    async def body(desk: Desk) -> None:
        desk.ask(request="r")
        assert (await desk.answered(1))[0].code is Code.UNAVAILABLE
        desk.ask(request="r")
        assert (await desk.answered(2))[1] == Created(2)

    at_desk(tmp_path, handler, body)


def test_a_method_that_changes_nothing_is_not_stored(tmp_path: Path) -> None:
    runs = 0

    def handler(_params: Any, _call: Call) -> Created:
        nonlocal runs
        runs += 1
        return Created(runs)

    async def body(desk: Desk) -> None:
        desk.ask(request="r", method="container.state")
        desk.ask(request="r", method="container.state")
        assert desk.answers == [Created(1), Created(2)]

    at_desk(tmp_path, handler, body)


def test_a_later_agent_answers_from_what_was_written_down(tmp_path: Path) -> None:
    async def body(desk: Desk, gate: Gate) -> None:
        gate.open.set()
        desk.ask({"container": "c"}, request="r")
        await desk.answered(1)
        successor = Desk(tmp_path, gate)
        successor.ask({"container": "c"}, request="r")
        assert await successor.answered(1) == [{"pid": 1}]
        assert gate.runs == 1

    gated(tmp_path, body)


def test_a_request_that_was_undone_with_its_agent_is_done_for_whoever_asks_again(tmp_path: Path) -> None:
    async def body(desk: Desk, gate: Gate) -> None:
        gate.open.set()
        desk.ask({"container": "c"}, request="r")
        await desk.answered(1)
        digest = (desk.journal.find("r") or pytest.fail("not kept")).digest
        for path in (tmp_path / "requests").iterdir():
            path.unlink()
        desk.journal.begin(RequestMark("r", digest))
        desk.ask({"container": "c"}, request="r")
        await asyncio.sleep(0)
        assert len(desk.answers) == 1
        desk.journal.finish(RequestMark("r", digest), UNDONE)
        assert (await desk.answered(2))[1] == Created(2)

    gated(tmp_path, body)


def test_a_request_is_the_same_whatever_the_order_of_its_keys(tmp_path: Path) -> None:
    """A client in Go makes a spec of maps that come in another order each time."""
    first = {
        "container": "c",
        "spec": {"process": {"args": ["a", "b"], "cwd": "/"}, "mounts": [{"a": 1, "b": 2}]},
    }
    again = {
        "spec": {"mounts": [{"b": 2, "a": 1}], "process": {"cwd": "/", "args": ["a", "b"]}},
        "container": "c",
    }
    other = {
        "container": "c",
        "spec": {"process": {"args": ["b", "a"], "cwd": "/"}, "mounts": [{"a": 1, "b": 2}]},
    }

    async def body(desk: Desk, gate: Gate) -> None:
        gate.open.set()
        desk.ask(first, request="r")
        desk.ask(again, request="r")
        assert (await desk.answered(2), gate.runs) == ([Created(1), Created(1)], 1)
        desk.ask(other, request="r")
        assert (await desk.answered(3))[2].code is Code.ALREADY_EXISTS

    gated(tmp_path, body)


def test_what_was_begun_is_run_again_and_knows_it_unless_it_has_failed(tmp_path: Path) -> None:
    """A signal: whether it has been sent cannot be seen afterwards."""
    known: list[bool] = []

    def handler(params: Any, call: Call) -> Created:
        known.append(call.begun_before)
        desks[-1].journal.begun(call.mark)
        if len(known) == 1:
            raise KilledOver
        if len(known) == 3:
            raise RpcError(Code.FAILED_PRECONDITION, "no")
        return Created(len(known))

    async def body() -> None:
        desks.append(Desk(tmp_path, handler))
        with pytest.raises(KilledOver):
            desks[-1].ask({"container": "c"}, request="r")
        desks.append(Desk(tmp_path, handler))
        desks[-1].ask({"container": "d"}, request="r")
        assert (await desks[-1].answered())[0].code is Code.ALREADY_EXISTS
        for _ in range(2):  # the second is answered from the store
            desks[-1].ask({"container": "c"}, request="r")
        assert (await desks[-1].answered(3))[1:] == [Created(2), {"pid": 2}]
        for _ in range(2):
            desks[-1].ask({"container": "c"}, request="fails")
        assert (await desks[-1].answered(5))[3].code is Code.FAILED_PRECONDITION
        assert known == [False, True, False, False]

    desks: list[Desk] = []
    watched_loop.run(body())


class KilledOver(BaseException):
    """What an agent that is killed leaves behind: nothing but files."""


def test_requests_that_leave_no_answer_push_none_out(tmp_path: Path) -> None:
    """A signal to somebody who has gone is written down before it is sent, and struck out again."""

    async def scenario() -> None:
        journal = Journal(str(tmp_path))
        kept = MAX_STORED // 2 - 100
        for number in range(kept):
            mark = RequestMark(f"kept{number}", "digest")
            journal.begin(mark)
            journal.finish(mark, Created(number))
        for number in range(MAX_STORED - kept + 1):
            mark = RequestMark(f"failed{number}", "digest")
            journal.begin(mark)
            journal.begun(mark)
            journal.finish(mark, RpcError(Code.NOT_FOUND, "gone"))
        missing = [number for number in range(kept) if journal.find(f"kept{number}") is None]
        assert missing == []

    asyncio.run(scenario())  # thousands of files in one go, as below


def test_the_store_is_bounded_and_survives_broken_files(tmp_path: Path) -> None:
    async def scenario() -> None:
        journal = Journal(str(tmp_path))
        for number in range(MAX_STORED + 10):
            journal.finish(RequestMark(f"r{number}", "d"), Created(number))
        names = os.listdir(tmp_path / "requests")
        assert len(names) <= MAX_STORED
        newest = journal.find(f"r{MAX_STORED + 9}")
        assert newest is not None
        assert journal.find("r0") is None
        for path in (tmp_path / "requests").iterdir():
            path.write_text("{")
        assert journal.find(f"r{MAX_STORED + 9}") is None

    asyncio.run(scenario())  # thousands of files in one go: the loop is not what is looked at


# -- deadlines and cancelling -----------------------------------------------------------------------


def test_a_deadline_undoes_what_was_begun_and_is_the_answer(tmp_path: Path) -> None:
    async def body(desk: Desk, gate: Gate) -> None:
        desk.ask(deadline=20)
        (error,) = await desk.answered()
        assert error.code is Code.DEADLINE_EXCEEDED
        assert METHOD in error.message
        assert gate.undone == 1

    gated(tmp_path, body)


def test_a_cancel_before_the_commit_point_wins_and_after_it_does_not(tmp_path: Path) -> None:
    async def before(desk: Desk, gate: Gate) -> None:
        call = desk.ask()
        await asyncio.sleep(0)
        call.abort(RpcError(Code.CANCELLED, "cancelled"))
        call.abort(RpcError(Code.DEADLINE_EXCEEDED, "too late"))
        assert [answer.code for answer in await desk.answered()] == [Code.CANCELLED]
        assert gate.undone == 1

    async def after(desk: Desk, gate: Gate) -> None:
        call = desk.ask()
        await asyncio.sleep(0)
        call.abort(RpcError(Code.CANCELLED, "cancelled"))
        call.abort(RpcError(Code.DEADLINE_EXCEEDED, "too late"))
        await asyncio.sleep(0)
        assert desk.answers == []
        gate.open.set()
        assert await desk.answered() == [Created(1)]
        assert gate.undone == 0

    gated(tmp_path, before)
    gated(tmp_path, after, commit=True)


def test_a_joined_request_has_its_own_deadline_and_can_be_cancelled_alone(tmp_path: Path) -> None:
    async def body(desk: Desk, gate: Gate) -> None:
        desk.ask(request="r")
        desk.ask(request="r", deadline=20)
        assert [answer.code for answer in await desk.answered(1)] == [Code.DEADLINE_EXCEEDED]
        third = desk.ask(request="r")
        await asyncio.sleep(0)
        third.abort(RpcError(Code.CANCELLED, "cancelled"))
        assert (await desk.answered(2))[1].code is Code.CANCELLED
        gate.open.set()
        assert (await desk.answered(3))[2] == Created(1)
        assert (gate.runs, gate.undone) == (1, 0)

    gated(tmp_path, body)


def test_whoever_joined_a_cancelled_request_hears_of_it(tmp_path: Path) -> None:
    async def body(desk: Desk, gate: Gate) -> None:
        first = desk.ask(request="r")
        desk.ask(request="r")
        await asyncio.sleep(0)
        first.abort(RpcError(Code.CANCELLED, "cancelled"))
        assert [answer.code for answer in await desk.answered(2)] == [Code.CANCELLED] * 2

    gated(tmp_path, body)


def test_an_abort_is_the_answer_even_if_undoing_fails(tmp_path: Path) -> None:
    async def handler(_params: Any, _call: Call) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise OSError("undoing failed")

    async def body(desk: Desk) -> None:
        desk.ask(deadline=20)
        assert [answer.code for answer in await desk.answered()] == [Code.DEADLINE_EXCEEDED]

    at_desk(tmp_path, handler, body)


# -- errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize(
    "error, code, says",
    [
        (RpcError(Code.NOT_FOUND, "no such thing"), Code.NOT_FOUND, "no such thing"),
        (RuntimeFailure("create", 1, "it said so"), Code.INTERNAL, "it said so"),
        (RuntimeFailure("create", -9, "", timed_out=True), Code.DEADLINE_EXCEEDED, "deadline"),
        (SupervisorError("spawn: no", 0), Code.INTERNAL, "spawn: no"),
        (SupervisorError("spawn: full", 28), Code.RESOURCE_EXHAUSTED, "full"),
        (OSError(24, "Too many open files"), Code.RESOURCE_EXHAUSTED, "Too many"),
        (OSError(2, "No such file"), Code.INTERNAL, "No such file"),
        (ZeroDivisionError("secret"), Code.INTERNAL, "a fault in the agent (ZeroDivisionError)"),
    ],
)
def test_whatever_a_handler_raises_is_one_typed_answer(
    tmp_path: Path, inline: bool, error: Exception, code: Code, says: str
) -> None:
    def raises(_params: Any, _call: Call) -> None:
        raise error

    async def raises_later(_params: Any, _call: Call) -> None:
        await asyncio.sleep(0)
        raise error

    async def body(desk: Desk) -> None:
        desk.ask()
        (answer,) = await desk.answered()
        assert answer.code is code
        assert says in answer.message
        assert "secret" not in answer.message

    at_desk(tmp_path, raises if inline else raises_later, body)


def test_a_request_with_its_cancel_right_behind_it_is_answered_and_never_run(tmp_path: Path) -> None:
    gate = Gate()

    async def body(desk: Desk) -> None:
        for request in (None, "r"):
            desk.ask(request=request).abort(RpcError(Code.CANCELLED, "no"))
        assert [answer.code for answer in await desk.answered(2)] == [Code.CANCELLED] * 2
        assert gate.runs == 0
        gate.open.set()
        desk.ask(request="r")
        await desk.answered(3)
        assert gate.runs == 1

    at_desk(tmp_path, gate.__call__, body)
