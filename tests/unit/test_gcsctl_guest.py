"""gcsctl's commands about the guest as a machine, against a scripted agent."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from protocol.errors import Code
from protocol.families.guest import AddEntropy, ClockChange, Entropy, GuestTime, SetTime, TimeSet
from tests.fakes.fake_agent import FakeAgent
from tests.unit import test_gcsctl
from tests.unit.test_gcsctl import gcsctl, refusing, with_agent

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
        assert shown.out.startswith("+36000")
        assert " ms ± " in shown.out
        found = json.loads((await gcsctl(agent, "--json", "clock", "--samples", "3")).out)
        assert abs(found["offset_ns"] - HOUR) <= found["error_ns"]
        assert found["samples"] == 3
        stepped = await gcsctl(agent, "clock", "--set", "step")
        assert stepped.out.startswith("was +36000")
        assert "; stepped, now " in stepped.out
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


@pytest.mark.parametrize(
    "words",
    [
        ("clock", "--set", "jump"),
        ("clock", "--samples", "0"),
        ("entropy", "--add", "4097"),
        ("entropy", "--add", "0"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, words: tuple[str, ...]) -> None:
    async def body(agent: FakeAgent) -> None:
        shown = await gcsctl(agent, *words)
        assert (shown.code, shown.out) == (125, "")
        assert words[1] in shown.err
        assert "--help" in shown.err

    with_agent(tmp_path, body)


@pytest.mark.parametrize("command", ["clock", "entropy"])
def test_help_has_an_example(command: str) -> None:
    test_gcsctl.test_help_has_an_example(command)
