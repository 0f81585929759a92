"""Whose runtime call is next."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from gcsagent.agent.turns import ASKED_BY, NotBegun, Turns
from protocol.limits import Limits
from tests.fakes import watched_loop


class Crowd:
    """Calls that go on until they are let end, noted as they begin: two of a connection's, three of all."""

    def __init__(self) -> None:
        self._turns = Turns(Limits(max_runtime_calls=2, max_runtime_calls_total=3))
        self._ends: dict[str, asyncio.Event] = {}
        self.begun: list[str] = []
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def ask(self, who: int, *names: str, action: str = "exec") -> None:
        async def call(name: str) -> None:
            ASKED_BY.set(who)
            async with self._turns.turn(action):
                self.begun.append(name)
                await self._ends[name].wait()

        for name in names:
            self._ends[name] = asyncio.Event()
            self.tasks[name] = asyncio.get_running_loop().create_task(call(name))
        await settled()

    async def end(self, name: str) -> None:
        self._ends[name].set()
        await self.tasks[name]
        await settled()

    async def end_all(self) -> None:
        for end in self._ends.values():
            end.set()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def scene(body: Callable[[Crowd], Awaitable[None]]) -> None:
    async def run() -> None:
        crowd = Crowd()
        await body(crowd)
        await crowd.end_all()
        lanes = (crowd._turns._launches, crowd._turns._controls)
        assert [(lane._total, lane._running, lane._waiting) for lane in lanes] == [(0, {}, {})] * 2

    watched_loop.run(run())


def test_a_crowd_waits_for_itself_and_another_connection_does_not() -> None:
    async def body(crowd: Crowd) -> None:
        await crowd.ask(1, "a1", "a2", "a3", "a4")
        assert crowd.begun == ["a1", "a2"]
        await crowd.ask(2, "b1")
        assert crowd.begun == ["a1", "a2", "b1"]
        await crowd.end("a2")
        assert crowd.begun == ["a1", "a2", "b1", "a3"]

    scene(body)


def test_connections_are_served_in_turn() -> None:
    async def body(crowd: Crowd) -> None:
        await crowd.ask(1, "a1", "a2", "a3", "a4")
        await crowd.ask(2, "b1", "b2", "b3")
        await crowd.ask(3, "c1", "c2")
        assert crowd.begun == ["a1", "a2", "b1"]
        for name in ("a1", "a2", "b1", "a3", "b2"):
            await crowd.end(name)
        assert crowd.begun[3:] == ["a3", "b2", "c1", "a4", "b3"]

    scene(body)


def test_what_is_cancelled_in_the_queue_has_not_begun() -> None:
    async def body(crowd: Crowd) -> None:
        await crowd.ask(1, "a1", "a2", "a3", "a4")
        crowd.tasks["a3"].cancel()
        with pytest.raises(NotBegun):
            await crowd.tasks["a3"]
        await crowd.end("a1")
        assert crowd.begun == ["a1", "a2", "a4"]

    scene(body)


@pytest.mark.parametrize("cancelled_first", [False, True])
def test_a_turn_that_comes_as_it_is_cancelled_is_the_next_ones(cancelled_first: bool) -> None:
    async def body(crowd: Crowd) -> None:
        await crowd.ask(1, "a1", "a2", "a3", "a4")
        lane = crowd._turns._launches
        if cancelled_first:
            crowd.tasks["a3"].cancel()
        crowd._ends["a1"].set()
        await asyncio.sleep(0)
        if not cancelled_first:
            assert lane._running == {1: 2}  # it has its turn, and has not gone on yet
            assert crowd.begun == ["a1", "a2"]
            crowd.tasks["a3"].cancel()
        with pytest.raises(NotBegun):
            await crowd.tasks["a3"]
        await settled()
        assert crowd.begun == ["a1", "a2", "a4"]

    scene(body)


def test_the_agents_own_calls_wait_for_nobody_and_controls_not_for_launches() -> None:
    async def body(crowd: Crowd) -> None:
        await crowd.ask(1, "a1", "a2", "a3")
        await crowd.ask(2, "b1", "b2")
        await crowd.ask(1, "pause", action="pause")
        await crowd.ask(0, "undo1", "undo2", "undo3", "undo4", action="delete")
        assert crowd.begun == ["a1", "a2", "b1", "pause", "undo1", "undo2", "undo3", "undo4"]

    scene(body)
