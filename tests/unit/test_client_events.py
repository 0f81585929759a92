"""A subscription: whoever waits is told when it ends and when something is gone, and loses nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from gcsagent.host.client import Client
from gcsagent.host.errors import ClosedByUs, EventsMissed
from gcsagent.host.events import EventStream
from protocol.families.agent import Welcome
from protocol.families.events import Subscribe, Subscribed
from protocol.methods import HELLO
from protocol.types import Event
from tests.fakes.fake_agent import FakeAgent


class Ring:
    """A fake agent's events, numbered from 1, of which it keeps those behind ``lost``."""

    def __init__(self, agent: FakeAgent) -> None:
        self.agent = agent
        self.events: list[Event] = []
        self.lost = 0
        agent.handlers["events.subscribe"] = self._subscribe

    def happen(self, count: int = 1) -> None:
        for _ in range(count):
            self.events.append(Event(len(self.events) + 1, "container.paused", 1, "c"))
            self.agent.publish(self.events[-1])

    def begin_anew(self, boot_id: str, generation: int) -> None:
        """Everybody is cut off, and nothing is left."""
        self.events, self.lost = [], 0
        self.agent.handlers[HELLO] = lambda params: Welcome(1, "fake", boot_id, generation)
        self.agent.drop_all()

    def _subscribe(self, wanted: Subscribe) -> Subscribed:
        after = len(self.events) if wanted.after is None else wanted.after
        missed = [event for event in self.events[self.lost :] if event.seq > after]
        loop = asyncio.get_running_loop()
        for event in missed:
            loop.call_later(0.01, self.agent.publish, event)  # behind the answer
        return Subscribed(len(self.events), max(0, self.lost - after))


def with_ring(tmp_path: Path, body: Callable[[Ring, Client], Awaitable[None]]) -> None:
    async def scenario() -> None:
        async with (
            asyncio.timeout(20),
            FakeAgent(tmp_path / "s") as agent,
            await Client.connect(agent.address, timeout=1000) as client,
        ):
            await body(Ring(agent), client)

    asyncio.run(scenario())


async def waiting_for_the_next(events: EventStream) -> asyncio.Task[Event]:
    task = asyncio.ensure_future(anext(events))
    await asyncio.sleep(0)
    return task


def test_closing_ends_a_wait_for_the_next(tmp_path: Path) -> None:
    async def body(ring: Ring, client: Client) -> None:
        events = await client.events()
        waiting = await waiting_for_the_next(events)
        await events.aclose()
        with pytest.raises(ClosedByUs):
            await waiting
        with pytest.raises(ClosedByUs):
            await anext(events)

    with_ring(tmp_path, body)


def test_closing_ends_a_wait_for_an_agent_to_come_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with asyncio.timeout(20):
            async with FakeAgent(tmp_path / "s") as agent:
                Ring(agent)
                client = await Client.connect(agent.address, timeout=1000)
                events = await client.events()
            waiting = await waiting_for_the_next(events)
            await asyncio.sleep(0.05)  # it dials
            await events.aclose()
            with pytest.raises(ClosedByUs):
                await waiting
            await client.aclose()

    asyncio.run(scenario())


def test_a_cancelled_wait_loses_nothing_that_came_just_then(tmp_path: Path) -> None:
    async def body(ring: Ring, client: Client) -> None:
        async with await client.events() as events:
            waiting = await waiting_for_the_next(events)
            ring.happen()
            # The loop finds the socket readable, wakes the waiting task, and cancels it before it runs.
            loop = asyncio.get_running_loop()
            loop.call_soon(lambda: loop.call_soon(waiting.cancel))
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert (await anext(events)).seq == 1
            ring.happen()
            assert (await anext(events)).seq == 2

    with_ring(tmp_path, body)


def test_a_strict_one_tells_once_of_what_the_ring_has_lost(tmp_path: Path) -> None:
    async def body(ring: Ring, client: Client) -> None:
        async with await client.events(strict=True) as events:
            ring.happen(2)
            assert [(await anext(events)).seq for _ in range(2)] == [1, 2]
            ring.agent.drop_all()
            ring.happen(7)
            ring.lost = 6
            with pytest.raises(EventsMissed, match="4 events were missed") as caught:
                await anext(events)
            assert (caught.value.dropped, events.dropped) == (4, 4)
            assert [(await anext(events)).seq for _ in range(3)] == [7, 8, 9]

    with_ring(tmp_path, body)


@pytest.mark.parametrize("boot_id, generation, newer", [("other", 3, 9), ("boot", 1, 9), ("boot", 2, 2)])
def test_a_strict_one_tells_that_numbers_began_anew(
    tmp_path: Path, boot_id: str, generation: int, newer: int
) -> None:
    """By another boot, by a supervisor that counts its agents from 1 again, or by numbers that went back."""

    async def body(ring: Ring, client: Client) -> None:
        ring.agent.handlers[HELLO] = lambda params: Welcome(1, "fake", "boot", 2)
        async with await client.events(strict=True) as events:
            ring.happen(5)
            assert [(await anext(events)).seq for _ in range(5)] == [1, 2, 3, 4, 5]
            ring.begin_anew(boot_id, generation)
            ring.happen(newer)
            with pytest.raises(EventsMissed, match="began anew") as caught:
                await anext(events)
            assert caught.value.dropped == 0
            assert [(await anext(events)).seq for _ in range(newer)] == list(range(1, newer + 1))

    with_ring(tmp_path, body)


def test_another_agent_of_the_same_supervisor_goes_on(tmp_path: Path) -> None:
    async def body(ring: Ring, client: Client) -> None:
        async with await client.events(strict=True) as events:
            ring.happen(2)
            assert [(await anext(events)).seq for _ in range(2)] == [1, 2]
            ring.agent.handlers[HELLO] = lambda params: Welcome(1, "fake", "boot", 2)
            ring.agent.drop_all()
            ring.happen(2)
            assert [(await anext(events)).seq for _ in range(2)] == [3, 4]

    with_ring(tmp_path, body)
