"""gcsctl's commands about the guest as a machine, against a scripted agent."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from pathlib import Path

import pytest

from protocol.errors import Code
from protocol.families.events import Subscribed
from protocol.families.guest import (
    AddEntropy,
    ClockChange,
    CpuLists,
    Entropy,
    GuestTime,
    MemoryBlocks,
    PressureRef,
    Resources,
    SetTime,
    TimeSet,
    WatchPressure,
)
from protocol.method import Empty
from protocol.types import Event
from tests.fakes.fake_agent import FakeAgent
from tests.gcsctl_process import SECONDS, gcsctl, refusing, running, with_agent

HOUR = 3600 * 10**9


def fast(agent: FakeAgent, ahead: int = HOUR) -> list[SetTime]:
    """A guest whose clock is an hour ahead until it is set; what it is told."""
    told: list[SetTime] = []

    def now(_params: object) -> GuestTime:
        steps = [each.offset_ns or 0 for each in told if each.how is ClockChange.STEP]
        slews = [each.offset_ns or 0 for each in told if each.how is ClockChange.SLEW]
        reading = time.time_ns() + ahead + sum(steps)
        return GuestTime(reading, reading, 1, slews[-1] if slews else 0)

    def take(params: SetTime) -> TimeSet:
        told.append(params)
        return TimeSet(1, 2, 0)

    agent.handlers |= {"guest.time": now, "guest.set_time": take}
    return told


def test_clock_measures_and_sets(tmp_path: Path) -> None:
    async def body(agent: FakeAgent) -> None:
        told = fast(agent)
        shown = await gcsctl(agent, "clock")
        assert (shown.code, shown.err, told) == (0, "", [])
        assert float(shown.out.partition(" ms ± ")[0]) == pytest.approx(HOUR / 1e6, abs=50)
        found = json.loads((await gcsctl(agent, "--json", "clock", "--samples", "3")).out)
        assert abs(found["offset_ns"] - HOUR) <= found["error_ns"]
        assert found["samples"] == 3
        stepped = await gcsctl(agent, "clock", "--set", "step")
        was, _, now = stepped.out.partition("; stepped, now ")
        assert float(was.removeprefix("was ").split()[0]) == pytest.approx(HOUR / 1e6, abs=50)
        assert now != ""
        assert [each.how for each in told] == [ClockChange.STEP]

    with_agent(tmp_path, body)


def test_clock_slews(tmp_path: Path) -> None:
    async def body(agent: FakeAgent) -> None:
        told = fast(agent, ahead=2_000_000)
        shown = await gcsctl(agent, "clock", "--set=slew", "--samples=2")
        assert shown.out.endswith(f"the guest slews {(told[0].offset_ns or 0) / 1e6:+.3f} ms\n")
        assert "left to slew" in (await gcsctl(agent, "clock")).out
        done = json.loads((await gcsctl(agent, "clock", "--set=slew", "--json")).out)
        assert (done["how"], done["after"]["slewing_ns"]) == ("slew", told[1].offset_ns)

    with_agent(tmp_path, body)


def test_a_clock_that_must_not_be_set(tmp_path: Path) -> None:
    async def body(agent: FakeAgent) -> None:
        fast(agent)
        agent.handlers["guest.set_time"] = refusing(Code.FAILED_PRECONDITION, "this is no guest")
        shown = await gcsctl(agent, "clock", "--set", "step")
        assert (shown.code, shown.out) == (125, "")
        assert "this is no guest" in shown.err

    with_agent(tmp_path, body)


def test_entropy_shows_and_feeds(tmp_path: Path) -> None:
    async def body(agent: FakeAgent) -> None:
        fed: list[AddEntropy] = []

        def feed(params: AddEntropy) -> Entropy:
            fed.append(params)
            return Entropy(256, 256)

        agent.handlers["guest.entropy"] = lambda params: Entropy(200, 256, "virtio_rng.0")
        agent.handlers["guest.add_entropy"] = feed
        shown = await gcsctl(agent, "entropy")
        assert [line.split() for line in shown.out.splitlines()] == [
            ["available:", "200", "of", "256", "bits"],
            ["source:", "virtio_rng.0"],
        ]
        assert "no hardware generator" in (await gcsctl(agent, "entropy", "--add", "64")).out
        await gcsctl(agent, "entropy", "--add", "64")
        assert [(len(each.data), each.bits, each.reseed) for each in fed] == [(64, None, True)] * 2
        assert fed[0].data != fed[1].data

    with_agent(tmp_path, body)


HAS = Resources(
    CpuLists("0-3", "0-2", "0-1"),
    MemoryBlocks(1000, 900, 128 << 20, "0-7", "32"),
    (WatchPressure("w-1", container="web"),),
)


def test_resources_and_online(tmp_path: Path) -> None:
    async def body(agent: FakeAgent) -> None:
        agent.handlers |= {"guest.resources": lambda params: HAS, "guest.online": lambda params: HAS}
        shown = await gcsctl(agent, "resources")
        assert [line.split(None, 2)[-1] for line in shown.out.splitlines()[:3]] == ["0-1", "0-2", "0-3"]
        assert "900 KiB available of 1000 KiB" in shown.out
        assert "of 128 MiB, online 0-7" in shown.out
        assert "watch w-1:      memory, some, 150 ms in 1000 ms in web" in shown.out
        assert json.loads((await gcsctl(agent, "--json", "resources")).out)["cpus"]["possible"] == "0-3"
        assert (await gcsctl(agent, "online")).out == shown.out
        await gcsctl(agent, "online", "--cpus", "2", "--memory=32-33")
        assert agent.named("guest.online")[1] == {"cpus": "2", "memory": "32-33", "wait_ms": 5000}

    with_agent(tmp_path, body)


def test_pressure_shows_its_own_watch_until_interrupted(tmp_path: Path) -> None:
    async def body(agent: FakeAgent) -> None:
        ended = asyncio.Event()

        def watch(params: WatchPressure) -> Empty:
            for number, ident in enumerate(("another", params.watch), 1):
                data = {"watch": ident, "kind": "full", "full_avg10": 1.5, "some_avg10": 2.0}
                agent.publish(Event(number, "memory.pressure", 1, "web", "", data))
            return Empty()

        def unwatch(_params: PressureRef) -> Empty:
            ended.set()
            return Empty()

        agent.handlers |= {"guest.watch_pressure": watch, "guest.unwatch_pressure": unwatch}
        agent.handlers["events.subscribe"] = lambda params: Subscribed(0, 0)
        words = ("pressure", "--full", "--stall", "20", "--window", "500", "web")
        async with asyncio.timeout(SECONDS), running(agent, *words) as process:
            assert process.stdout is not None
            assert await process.stdout.readline() == b"full full_avg10=1.5 some_avg10=2.0\n"
            process.send_signal(signal.SIGINT)
            await process.wait()
            await ended.wait()
        [asked] = agent.named("guest.watch_pressure")
        assert (asked["stall_us"], asked["window_us"], asked["container"]) == (20_000, 500_000, "web")
        assert agent.named("guest.unwatch_pressure") == [{"watch": asked["watch"]}]

    with_agent(tmp_path, body)


def test_shutdown(tmp_path: Path) -> None:
    async def body(agent: FakeAgent) -> None:
        agent.handlers["agent.shutdown"] = lambda params: Empty()
        assert (await gcsctl(agent, "shutdown")).code == 0
        shown = json.loads((await gcsctl(agent, "--json", "shutdown", "--reboot", "--grace", "1.5")).out)
        assert shown == {"action": "reboot", "grace_ms": 1500}
        assert agent.named("agent.shutdown") == [{"action": "poweroff", "grace_ms": 10_000}, shown]

    with_agent(tmp_path, body)


def test_a_vm_that_is_not_there_does_not_grow(tmp_path: Path) -> None:
    async def body(agent: FakeAgent) -> None:
        shown = await gcsctl(agent, "vm", "grow", "nobody-has-this", "--cpus", "1")
        assert (shown.code, shown.out) == (125, "")
        assert "nobody-has-this" in shown.err
        assert "give --cpus or --memory" in (await gcsctl(agent, "vm", "grow", "x")).err

    with_agent(tmp_path, body)


@pytest.mark.parametrize(
    "words",
    [
        ("clock", "--set", "jump"),
        ("clock", "--samples", "0"),
        ("entropy", "--add", "4097"),
        ("entropy", "--add", "0"),
        ("online", "--cpus", "all"),
        ("pressure", "--window", "0"),
        ("vm", "grow", "x", "--cpus", "0"),
        ("shutdown", "--grace", "601"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, words: tuple[str, ...]) -> None:
    async def body(agent: FakeAgent) -> None:
        shown = await gcsctl(agent, *words)
        assert (shown.code, shown.out) == (125, "")
        assert words[-2] in shown.err
        assert "--help" in shown.err

    with_agent(tmp_path, body)
