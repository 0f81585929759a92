"""Room for large answers: kept in order, given back, and never lost to what was cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from gcsagent.agent.room import MAX_ROOM, Room
from gcsagent.agent.wire import MAX_UNREAD
from tests.fakes import watched_loop

LARGE = MAX_ROOM * 2 // 3


class Scene:
    def __init__(self) -> None:
        self.unread = 0
        self.room = Room(lambda: self.unread)

    async def ask(self, size: int) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(self.room.reserve(size))
        await settled()
        return task


async def settled() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


def scene(body: Callable[[Scene], Awaitable[None]]) -> None:
    async def run() -> None:
        await body(Scene())

    watched_loop.run(run())


def test_what_does_not_fit_waits_and_what_came_later_behind_it() -> None:
    async def body(at: Scene) -> None:
        first, second, third = [await at.ask(size) for size in (LARGE, LARGE, 1)]
        assert [task.done() for task in (first, second, third)] == [True, False, False]
        at.room.release(LARGE)
        await settled()
        assert second.done()
        assert third.done()

    scene(body)


def test_one_fits_however_large_but_not_for_a_host_that_does_not_read() -> None:
    async def body(at: Scene) -> None:
        at.unread = MAX_UNREAD + 1
        task = await at.ask(10 * MAX_ROOM)
        assert not task.done()
        at.unread = 0
        at.room.look_again()
        await task

    scene(body)


@pytest.mark.parametrize("granted", [False, True])
def test_what_is_cancelled_keeps_no_room(granted: bool) -> None:
    async def body(at: Scene) -> None:
        _, second, third = [await at.ask(LARGE) for _ in range(3)]
        if granted:
            at.room.release(LARGE)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        if not granted:
            at.room.release(LARGE)
        await settled()
        assert third.done()

    scene(body)
