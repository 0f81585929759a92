"""guest.*: what an agent makes of its machine's clock and generator, and what it refuses to do to them."""

from __future__ import annotations

import errno
import fcntl
import logging
import struct
import time
from typing import Any

import pytest

from gcsagent.agent.call import Call
from gcsagent.agent.guest import clock
from gcsagent.agent.guest import entropy as entropies
from gcsagent.agent.guest.clock import ClockService
from gcsagent.agent.guest.entropy import RNDADDENTROPY, RNDRESEEDCRNG, EntropyService
from gcsagent.agent.logs import context
from protocol.errors import Code, RpcError
from protocol.families.guest import AddEntropy, ClockChange, SetTime
from protocol.method import Empty
from tests.fakes import watched_loop


def ask(handler: Any, params: Any) -> Any:
    """What an inline handler answers."""

    answers: list[Any] = []

    async def scenario() -> None:
        answers.append(handler(params, Call("guest.x", 10_000, context(logging.getLogger("test")))))

    watched_loop.run(scenario())
    return answers[0]


def refusal(handler: Any, params: Any) -> tuple[Code, Any, str]:
    with pytest.raises(RpcError) as caught:
        ask(handler, params)
    return caught.value.code, caught.value.details.get("field"), caught.value.message


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the kernel would have been asked: this machine's clock and generator are left alone."""
    calls: list[Any] = []

    def slew(ns: int | None) -> int:
        calls.append(ns)
        return -7000

    monkeypatch.setattr(time, "clock_settime_ns", lambda which, ns: calls.append((which, ns)))
    monkeypatch.setattr(clock, "_slew", slew)
    monkeypatch.setattr(fcntl, "ioctl", lambda fd, operation, argument=0: calls.append((operation, argument)))
    return calls


def test_the_time_is_this_machines_and_both_readings_are_in_order() -> None:
    before = time.time_ns()
    found = ask(ClockService(False).time, Empty())
    assert before <= found.received_ns <= found.sent_ns <= time.time_ns()
    assert 0 < found.boottime_ns <= time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def test_outside_a_guest_nothing_is_changed(asked: list[Any]) -> None:
    for handler, params in (
        (ClockService(False).set_time, SetTime(offset_ns=1)),
        (EntropyService(False).add, AddEntropy(b"x")),
    ):
        code, _, message = refusal(handler, params)
        assert (code, "--guest" in message) == (Code.FAILED_PRECONDITION, True)
    assert asked == []


def test_a_step_is_by_an_offset_or_to_a_time(asked: list[Any]) -> None:
    service = ClockService(True)
    moved = ask(service.set_time, SetTime(offset_ns=-5_000_000_000))
    ask(service.set_time, SetTime(time_ns=1_700_000_000_000_000_000))
    assert asked[0] == (time.CLOCK_REALTIME, moved.before_ns - 5_000_000_000)
    assert (time.CLOCK_REALTIME, 1_700_000_000_000_000_000) in asked


def test_a_slew_is_left_to_the_kernel(asked: list[Any]) -> None:
    done = ask(ClockService(True).set_time, SetTime(offset_ns=-2_000_000, how=ClockChange.SLEW))
    assert asked == [-2_000_000, None]
    assert done.slewing_ns == -7000


@pytest.mark.parametrize(
    "params, field",
    [
        (SetTime(), "offset_ns"),
        (SetTime(time_ns=1, offset_ns=1), "offset_ns"),
        (SetTime(time_ns=1, how=ClockChange.SLEW), "time_ns"),
        (SetTime(offset_ns=-10_000_000_001, how=ClockChange.SLEW), "offset_ns"),
    ],
)
def test_nonsense_is_named(asked: list[Any], params: SetTime, field: str) -> None:
    assert refusal(ClockService(True).set_time, params)[:2] == (Code.INVALID_ARGUMENT, field)
    assert asked == []


@pytest.mark.parametrize(
    "problem, code",
    [
        (OSError(errno.EINVAL, "Invalid argument"), Code.INVALID_ARGUMENT),
        (OverflowError("timestamp out of range"), Code.INVALID_ARGUMENT),
        (PermissionError(errno.EPERM, "Operation not permitted"), Code.PERMISSION_DENIED),
    ],
)
def test_a_time_the_kernel_does_not_take(
    monkeypatch: pytest.MonkeyPatch, problem: Exception, code: Code
) -> None:
    def refuse(_which: int, _ns: int) -> None:
        raise problem

    monkeypatch.setattr(time, "clock_settime_ns", refuse)
    assert refusal(ClockService(True).set_time, SetTime(offset_ns=1 << 63))[:2] == (code, "offset_ns")


def test_entropy_is_credited_and_the_generator_reseeded(asked: list[Any]) -> None:
    service = EntropyService(True)
    ask(service.add, AddEntropy(b"abcd"))
    ask(service.add, AddEntropy(b"abcd", bits=3, reseed=False))
    assert asked == [
        (RNDADDENTROPY, struct.pack("=ii", 32, 4) + b"abcd"),
        (RNDRESEEDCRNG, 0),
        (RNDADDENTROPY, struct.pack("=ii", 3, 4) + b"abcd"),
    ]
    assert refusal(service.add, AddEntropy(b"abcd", bits=33))[:2] == (Code.INVALID_ARGUMENT, "bits")
    assert len(asked) == 3


def test_a_generator_that_was_never_fed_cannot_be_reseeded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_fd: int, operation: int, _argument: object = 0) -> None:
        if operation == RNDRESEEDCRNG:
            raise OSError(errno.ENODATA, "No data available")

    monkeypatch.setattr(fcntl, "ioctl", refuse)
    assert refusal(EntropyService(True).add, AddEntropy(b"x"))[0] is Code.FAILED_PRECONDITION


def test_what_the_kernel_says_of_its_generator() -> None:
    found = ask(EntropyService(False).entropy, Empty())
    assert 0 < found.available_bits <= found.pool_bits
    assert entropies.look() == found
