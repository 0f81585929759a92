"""The event ring: numbered without a gap, bounded, honest about what it dropped, and the next agent's too."""

from __future__ import annotations

import os

import pytest

from gcsagent.agent.events import DEFAULT_SIZE, EventLog
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
    assert (log.first, log.last, log.dropped(0)) == (1, 0, 0)
    for number in range(10):
        log.publish(f"kind{number}")
    assert [(log.get(seq).seq, log.get(seq).type) for seq in (1, 5, 10)] == [
        (1, "kind0"),
        (5, "kind4"),
        (10, "kind9"),
    ]
    assert log.dropped(4) == log.dropped(10) == log.dropped(99) == 0


@pytest.mark.parametrize("size", [64 << 10, DEFAULT_SIZE])
def test_what_left_the_ring_is_counted(size: int) -> None:
    log = EventLog(size=size)
    payload = "x" * 1000
    while log.dropped(0) == 0:
        log.publish("big", payload=payload)
        assert log.last < 5000
    for _ in range(1234):
        log.publish("big", payload=payload)
    kept = list(log.all())
    assert log.dropped(0) + len(kept) == log.last
    assert [event.seq for event in kept] == list(range(log.first, log.last + 1))
    assert len(kept) * 1000 >= size // 2 - 2000  # at least one segment's worth is kept
    assert log.dropped(log.last - 3) == 0
    assert list(EventLog(os.dup(log.fd)).all()) == kept  # whatever size that one would have made


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
    committed = log._ring._words[0]
    log.publish("half written")
    log._ring._words[0] = committed  # the store that would have made it count never came
    after = EventLog(os.dup(log.fd))
    assert [event.type for event in after.all()] == ["whole"]
    after.publish("next")
    assert [(event.seq, event.type) for event in after.all()] == [(1, "whole"), (2, "next")]


def test_an_agent_killed_as_it_turned_to_the_other_segment_loses_only_the_oldest() -> None:
    log = EventLog()
    while log._ring._active == 0:
        log.publish("big", payload="x" * 1000)
    while log._ring._active == 1:
        log.publish("big", payload="x" * 1000)
    log._ring._words[0] = 0  # emptied, and killed before the first event of the new round
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
