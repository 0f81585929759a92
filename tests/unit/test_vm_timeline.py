"""A VM's start on one clock: host's steps, the guest's stages, and where the guest's clock began."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest

from gcsagent.host.vm.config import VmConfig
from gcsagent.host.vm.console import STAGES
from gcsagent.host.vm.errors import BootError
from gcsagent.host.vm.greeting import ANSWER_SECONDS
from gcsagent.host.vm.launcher import VirtualMachine
from gcsagent.host.vm.timeline import MEANINGS, Moment, Timeline, table
from tests.fakes.vm import FakeHost, fake_host


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHost]:
    yield from fake_host(monkeypatch)


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


def test_the_guests_clock_is_set_by_its_quickest_line(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    timeline = Timeline()
    clock.now += 1.0
    timeline.mark("qemu")
    told: dict[str, float] = {}
    # Its clock begins 1.5 s after the launch; the lines take 0.5, 0.1 and 0.3 s.
    for stage, uptime, late in (("kernel", 2.0, 0.5), ("init", 2.25, 0.1), ("ready", 4.0, 0.3)):
        told[stage] = uptime
        clock.now = 101.5 + uptime + late
        timeline.guest(told)
        timeline.guest(told)  # a line that is no new stage
    clock.now += 0.1
    timeline.mark("hello")
    assert [(each.stage, round(each.seconds, 3)) for each in timeline.moments()] == [
        ("qemu", 1.0),
        ("firmware", 1.6),
        ("kernel", 3.6),
        ("init", 3.85),
        ("ready", 5.6),
        ("hello", 5.9),
    ]


def test_a_second_attempt_replaces_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    timeline = Timeline()
    timeline.mark("vsock")
    timeline.guest({"kernel": 0.0})
    clock.now += 2.0
    timeline.again()
    timeline.mark("vsock")
    assert timeline.moments() == (Moment("vsock", 2.0),)


def test_the_table_shows_when_and_how_long() -> None:
    assert table([Moment("qemu", 0.5), Moment("unheard-of", 2.25)]) == [
        "  0.500 s  +0.500  qemu        QEMU started, its monitor answers",
        "  2.250 s  +1.750  unheard-of",
    ]


def test_every_stage_has_its_meaning() -> None:
    assert set(STAGES) < set(MEANINGS)


def test_a_launch_has_all_of_them(host: FakeHost) -> None:
    async def scenario() -> list[str]:
        async with await VirtualMachine.launch(VmConfig(accel="tcg", vsock="vhost-user")) as vm:
            return [moment.stage for moment in vm.timeline.moments()]

    stages = asyncio.run(scenario())
    assert stages[-1] == "hello"
    assert set(stages) == set(MEANINGS) - {"restored"}


def test_a_guest_that_is_ready_but_out_of_reach_has_failed(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VSOCK", "deaf")
    monkeypatch.setitem(ANSWER_SECONDS, "tcg", 0.5)
    with pytest.raises(BootError) as caught:
        asyncio.run(VirtualMachine.launch(VmConfig(accel="tcg", vsock="vhost-user")))
    assert caught.value.stage == "ready"
    assert str(caught.value).startswith(
        "VM boot failed after stage 'ready': the agent is ready but cannot be reached over vsock: no agent"
        " answered in 0.5 s: "
    )
    assert (host.leftovers(), host.processes()) == ([], [])
