"""The host's side of the guest's clock: the shortest trip wins, and steps are checked by measuring again."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from gcsagent.host import clock
from gcsagent.host.client import Client
from protocol.errors import Code, RpcError
from protocol.families.guest import ClockChange, GuestTime, SetTime, TimeSet
from tests.fakes.fake_agent import FakeAgent, with_client

AHEAD = 5_000_000_000


class Guest:
    """A clock that is ``ahead`` of ours, and takes what it is told, or half of it."""

    def __init__(self, agent: FakeAgent, *, late: tuple[float, ...] = (), takes: float = 1.0) -> None:
        self.ahead, self.slewing, self.late, self.takes = AHEAD, 0, list(late), takes
        agent.handlers["guest.time"] = self.time
        agent.handlers["guest.set_time"] = self.set_time

    async def time(self, _params: object) -> GuestTime:
        if self.late:
            await asyncio.sleep(self.late.pop())  # on the way to the guest: what a long trip may hide
        now = time.time_ns() + self.ahead
        return GuestTime(now, now, 1, self.slewing)

    def set_time(self, params: SetTime) -> TimeSet:
        assert params.offset_ns is not None
        if params.how is ClockChange.SLEW:
            self.slewing = params.offset_ns
        else:
            self.ahead += int(params.offset_ns * self.takes)
        return TimeSet(1, 2, self.slewing)


def test_the_shortest_trip_wins_and_says_how_far_it_may_be_off(tmp_path: Path) -> None:
    async def body(agent: FakeAgent, client: Client) -> None:
        Guest(agent, late=(0.2, 0.0, 0.3))
        found = await clock.measure(client, 4)
        assert (found.samples, found.error_ns) == (4, (found.round_trip_ns + 1) // 2)
        assert found.round_trip_ns < 200_000_000
        assert abs(found.offset_ns - AHEAD) <= found.error_ns

    with_client(tmp_path, body)


def test_a_step_is_checked_and_repeated_where_it_fell_short(tmp_path: Path) -> None:
    async def body(agent: FakeAgent, client: Client) -> None:
        Guest(agent)
        done = await clock.sync(client)
        assert abs(done.before.offset_ns - AHEAD) <= done.before.error_ns
        assert abs(done.after.offset_ns) <= 2 * (done.before.error_ns + done.after.error_ns)
        assert len(agent.named("guest.set_time")) == 1
        half = Guest(agent, takes=0.5)
        done = await clock.sync(client)
        assert len(agent.named("guest.set_time")) == 1 + clock.STEPS
        assert abs(done.after.offset_ns - half.ahead) <= done.after.error_ns  # and told as it is

    with_client(tmp_path, body)


def test_a_slew_is_begun_once(tmp_path: Path) -> None:
    async def body(agent: FakeAgent, client: Client) -> None:
        Guest(agent)
        done = await clock.sync(client, ClockChange.SLEW, 2)
        [asked] = agent.named("guest.set_time")
        assert (asked["how"], asked["offset_ns"]) == ("slew", -done.before.offset_ns)
        assert done.after.slewing_ns == -done.before.offset_ns

    with_client(tmp_path, body)


def test_a_refusal_is_the_callers_to_see(tmp_path: Path) -> None:
    async def body(agent: FakeAgent, client: Client) -> None:
        def refuse(_params: SetTime) -> TimeSet:
            raise RpcError(Code.FAILED_PRECONDITION, "no guest")

        Guest(agent)
        agent.handlers["guest.set_time"] = refuse
        with pytest.raises(RpcError, match="no guest"):
            await clock.sync(client)
        assert (await clock.measure(client, 1)).samples == 1

    with_client(tmp_path, body)
