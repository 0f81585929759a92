"""The event ring: numbered without a gap, bounded, honest about what it dropped, and the next agent's too."""

from __future__ import annotations

import os

import pytest

from gcsagent.agent import events
from gcsagent.agent.events import EventLog
from protocol.types import Event


def test_events_are_numbered_from_one_and_reach_whoever_listens() -> None:
    log = EventLog()
    seen: list[Event] = []
    stop = log.listen(seen.append)
    log.publish("container.created", "c", "init", pid=7)
    log.publish("process.exited", "c", "p")
    stop()
    log.publish("nobody.listens")
    assert [(event.seq, event.type, event.container, event.process) for event in seen] == [
        (1, "container.created", "c", "init"),
        (2, "process.exited", "c", "p"),
    ]
    assert seen[0].data == {"pid": 7}
    assert log.last == 3


def test_a_replay_misses_nothing_after_the_number_asked_for() -> None:
    log = EventLog()
    for number in range(10):
        log.publish(f"kind{number}")
    missed, dropped = log.since(4)
    assert [event.seq for event in missed] == [5, 6, 7, 8, 9, 10]
    assert dropped == 0
    assert log.since(10) == ([], 0)
    assert log.since(99) == ([], 0)


def test_what_left_the_ring_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    log = EventLog()
    payload = "x" * 1000
    while log.since(0)[1] == 0:
        log.publish("big", payload=payload)
        assert log.last < 5000
    for _ in range(1234):
        log.publish("big", payload=payload)
    missed, dropped = log.since(0)
    assert dropped + len(missed) == log.last
    assert [event.seq for event in missed] == list(range(dropped + 1, log.last + 1))
    assert len(missed) * 1000 >= events.SEGMENT - 2000  # at least one segment's worth is kept
    assert log.since(log.last - 3)[1] == 0


def test_the_next_agent_goes_on_with_numbers_and_events_wherever_the_ring_stood() -> None:
    first = EventLog()
    for _ in range(3000):  # several times round
        first.publish("big", payload="x" * 700)
        if first.last % 500 == 0:
            second = EventLog(os.dup(first.fd))
            assert second.last == first.last
            assert list(second.all()) == list(first.all())
    second = EventLog(os.dup(first.fd))
    second.publish("after")
    assert second.last == first.last + 1
    assert list(second.all())[-1].type == "after"


def test_an_agent_killed_in_the_middle_of_writing_leaves_no_half_event() -> None:
    log = EventLog()
    log.publish("whole")
    committed = log._committed[0]
    log.publish("half written")
    log._committed[0] = committed  # the store that would have made it count never came
    after = EventLog(os.dup(log.fd))
    assert [event.type for event in after.all()] == ["whole"]
    after.publish("next")
    assert [(event.seq, event.type) for event in after.all()] == [(1, "whole"), (2, "next")]


def test_an_agent_killed_as_it_turned_to_the_other_segment_loses_only_the_oldest() -> None:
    log = EventLog()
    while log._active == 0:
        log.publish("big", payload="x" * 1000)
    while log._active == 1:
        log.publish("big", payload="x" * 1000)
    log._committed[0] = 0  # emptied, and killed before the first event of the new round
    after = EventLog(os.dup(log.fd))
    kept = [event.seq for event in after.all()]
    assert kept == list(range(kept[0], log.last))
    after.publish("next")
    assert after.last == log.last


def test_a_listener_may_leave_while_it_is_being_told() -> None:
    log = EventLog()
    seen: list[str] = []

    def once(_event: Event) -> None:
        seen.append("once")
        stop()

    stop = log.listen(once)
    log.listen(lambda event: seen.append(event.type))
    log.publish("a")
    log.publish("b")
    assert seen == ["once", "a", "b"]
