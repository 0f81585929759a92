"""The supervisor as a whole: agents that die in every way, what they leave behind, and how it all ends."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from gcsagent.common import channel
from gcsagent.supervisor.backoff import LONGEST_DELAY, SHORT_SECONDS, BackOff
from tests.fakes.supervised import Puppet, Refused, Supervised, eventually, state_of


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[Supervised]:
    with Supervised(tmp_path) as made:
        yield made


# -- agents -----------------------------------------------------------------------------------------


def test_a_dead_agent_has_a_successor_that_finds_what_was_held(supervised: Supervised) -> None:
    first = supervised.agent()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        first.ask("hold", {"hold": {"conn": 0}}, (theirs.fileno(),))
    first.end()
    second = supervised.agent()
    assert second.generation == first.generation + 1
    assert second.ask("list", {"kind": "names"}) == ["conn"]
    _, (fd,) = second.answer(second.send("fetch", {"names": ["conn"]}))
    with socket.socket(fileno=fd) as found:
        assert found.family == socket.AF_UNIX


def test_what_an_agent_said_with_its_last_breath_counts(supervised: Supervised) -> None:
    """Killed right behind its packets, with answers of the supervisor's unread, as a busy agent is."""
    for round_number in range(10):
        puppet = supervised.agent()
        with open("/dev/null", "rb") as null:
            for number in range(200):
                name = f"{round_number}.{number}"
                channel.send(
                    puppet.channel, channel.pack([number, "hold", {"hold": {name: 0}}]), (null.fileno(),)
                )
        puppet.end()
    successor = supervised.agent()
    names: list[str] = []
    while page := successor.ask("list", {"kind": "names", "start": len(names)}):
        names += page
    assert sorted(names) == sorted(f"{one}.{two}" for one in range(10) for two in range(200))


def test_ten_thousand_descriptors_are_kept_and_given_back(supervised: Supervised) -> None:
    count, batch = 10_000, 50
    first = supervised.agent()
    for start in range(0, count, batch):
        fds = [os.memfd_create(str(number)) for number in range(start, start + batch)]
        for number, fd in enumerate(fds, start):
            os.write(fd, str(number).encode())
        first.ask("hold", {"hold": {f"fd/{start + index}": index for index in range(batch)}}, tuple(fds))
        channel.close_all(fds)
    first.end()
    second = supervised.agent()
    for start in range(0, count, batch):
        names = [f"fd/{number}" for number in range(start, start + batch)]
        _, found = second.answer(second.send("fetch", {"names": names}))
        assert [os.pread(fd, 10, 0) for fd in found] == [name[3:].encode() for name in names]
        channel.close_all(found)
    for start in range(0, count, 1000):
        second.ask("release", {"names": [f"fd/{number}" for number in range(start, start + 1000)]})
    assert second.ask("list", {"kind": "names"}) == []


def test_deaths_before_ready_are_answered_later_and_later(supervised: Supervised) -> None:
    for generation in range(1, 4):
        puppet = supervised.agent(ready=False)
        assert puppet.generation == generation
        puppet.end(1)
    supervised.agent()
    delays = [line for line in supervised.logged().splitlines() if "retry_in_s" in line]
    assert [line.partition('"retry_in_s": ')[2] for line in delays] == ["0.1}", "0.2}", "0.4}"]


def test_ready_ends_the_back_off(supervised: Supervised) -> None:
    supervised.agent(ready=False).end(1)
    supervised.agent().end(1)
    supervised.agent()
    assert supervised.logged().count("retry_in_s") == 1


def test_agents_that_fail_soon_after_ready_again_and_again_are_put_off(supervised: Supervised) -> None:
    for _ in range(5):
        supervised.agent().end(1)
    supervised.agent()
    delays = [line for line in supervised.logged().splitlines() if "retry_in_s" in line]
    assert [line.partition('"retry_in_s": ')[2] for line in delays] == ["0.1}", "0.2}"]
    assert all("soon after it was ready" in line for line in delays)


def test_agents_that_are_killed_again_and_again_are_not(supervised: Supervised) -> None:
    for _ in range(12):
        supervised.agent().end()
    supervised.agent()
    assert "retry_in_s" not in supervised.logged()


def test_an_agent_that_the_supervisor_has_to_kill_has_failed(supervised: Supervised) -> None:
    for _ in range(4):
        puppet = supervised.agent()
        puppet.channel.send(b"\xc1")
        assert puppet.ended()
        puppet.close()
    supervised.agent()
    assert supervised.logged().count("retry_in_s") == 1


def test_a_long_life_is_a_good_one_and_no_delay_is_too_long() -> None:
    now = 0.0
    backoff = BackOff(lambda: now)

    def life(seconds: float, *, from_outside: bool = False) -> float:
        nonlocal now
        backoff.started()
        backoff.ready()
        now += seconds
        return backoff.ended(from_outside=from_outside)

    assert [life(1.0) for _ in range(5)] == [0, 0, 0, 0.1, 0.2]
    assert [life(0.0, from_outside=True), life(1.0)] == [0, 0.4]
    assert [life(SHORT_SECONDS), life(1.0)] == [0, 0]
    backoff.started()
    delays = [backoff.ended(from_outside=True) for _ in range(3000)]
    assert delays[:5] == [0.1, 0.2, 0.4, 0.8, 1.6]
    assert set(delays[5:]) == {LONGEST_DELAY}


def test_an_agent_that_cannot_use_its_settings_ends_the_supervisor(tmp_path: Path) -> None:
    with Supervised(tmp_path, env={"PUPPET_EXIT": "78"}) as supervised:
        assert supervised.wait() == 1
        assert '"status": 78' in supervised.logged()


def test_the_same_words_after_a_good_start_are_just_another_death(supervised: Supervised) -> None:
    supervised.agent().end(78)
    assert supervised.agent().generation == 2


def test_a_guest_whose_agent_never_starts_says_so_on_the_console_and_powers_off(tmp_path: Path) -> None:
    with Supervised(tmp_path, guest=True, env={"PUPPET_EXIT": "1"}) as supervised:
        assert supervised.wait() == 42
        assert "gcs-boot: FAILED agent: the agent ended 5 times before it was ready" in supervised.logged()
        assert supervised.process.stdout is not None
        assert supervised.process.stdout.read() == b"the machine's end: poweroff\n"


def test_a_guests_console_says_ready_once(tmp_path: Path) -> None:
    with Supervised(tmp_path, guest=True) as supervised:
        supervised.agent().end()
        supervised.agent()
        assert supervised.logged().count("gcs-boot: ready") == 1


def test_an_agent_that_cannot_be_started_any_more_is_tried_again(supervised: Supervised) -> None:
    puppet = supervised.agent()
    program = supervised.directory / "puppet"
    program.rename(program.with_name("away"))
    puppet.end()
    eventually(lambda: supervised.logged().count("cannot be started") >= 2, "it is tried again")
    program.with_name("away").rename(program)
    assert supervised.agent().generation > 2


# -- what an agent may do to it ---------------------------------------------------------------------


@pytest.mark.parametrize("packet", [b"\xc1", b"a" * (channel.MAX_PACKET + 1), b"\x90"])
def test_a_broken_packet_kills_the_agent_and_leaves_no_descriptor(
    supervised: Supervised, packet: bytes
) -> None:
    puppet = supervised.agent()
    before = supervised.descriptors()
    with open("/dev/null", "rb") as null:
        socket.send_fds(puppet.channel, [packet], [null.fileno()] * 5)
    assert puppet.ended()
    supervised.agent()
    assert supervised.descriptors() == before


def test_an_agent_that_closes_its_channel_and_lives_on_is_killed(supervised: Supervised) -> None:
    puppet = supervised.agent()
    puppet.channel.close()
    assert puppet.ended()
    assert supervised.agent().generation == 2


def test_an_agent_that_never_reads_costs_bounded_memory_and_gets_every_answer_in_the_end(
    supervised: Supervised,
) -> None:
    puppet = supervised.agent()
    puppet.channel.setblocking(False)
    sent = 0
    try:
        for sent in range(1_000_000):
            channel.send(puppet.channel, channel.pack([sent, "list", {"kind": "names"}]))
    except BlockingIOError:
        pass
    assert sent < 100_000  # it stopped reading
    puppet.channel.settimeout(20)
    for number in range(sent):
        received = channel.receive(puppet.channel)
        assert received is not None
        assert received[0] == [number, None, []]


def hold_many(puppet: Puppet) -> None:
    """480 names, more than a packet takes."""
    with open("/dev/null", "rb") as null:
        for batch in range(8):
            names = {f"{batch}.{number}.{'ü' * 500}": number for number in range(60)}
            puppet.ask("hold", {"hold": names}, (null.fileno(),) * 60)


def test_what_goes_between_two_pages_of_a_list_takes_no_other_with_it(supervised: Supervised) -> None:
    puppet = supervised.agent()
    hold_many(puppet)
    found = puppet.ask("list", {"kind": "names"})
    gone = found[:60]
    puppet.ask("release", {"names": gone})
    while page := puppet.ask("list", {"kind": "names", "start": len(found)}):
        found += page
    assert len(set(found)) == 480
    assert set(gone).isdisjoint(puppet.ask("list", {"kind": "names"}))


def test_lists_come_in_pages_that_fit_a_packet(supervised: Supervised) -> None:
    puppet = supervised.agent()
    hold_many(puppet)
    found: list[str] = []
    pages = 0
    while page := puppet.ask("list", {"kind": "names", "start": len(found)}):
        found += page
        pages += 1
    assert len(set(found)) == len(found) == 480
    assert 1 < pages < 20


# -- the end ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_the_agent_to_stop_and_stop_ends_it(tmp_path: Path, number: signal.Signals) -> None:
    with Supervised(tmp_path, env={"DRIVER_STOP_SECONDS": "30"}) as supervised:
        puppet = supervised.agent()
        supervised.process.send_signal(number)
        assert puppet.note("shutdown") == {"action": "exit", "grace_ms": 10_000}
        supervised.process.send_signal(number)  # once is enough
        channel.send(puppet.channel, channel.pack([1, "stop", {"action": "exit"}]))
        assert supervised.wait() == 0
        assert puppet.ended()


@pytest.mark.parametrize("number, action", [(signal.SIGTERM, "poweroff"), (signal.SIGINT, "reboot")])
def test_in_a_guest_the_machine_ends(tmp_path: Path, number: signal.Signals, action: str) -> None:
    with Supervised(tmp_path, guest=True) as supervised:
        puppet = supervised.agent()
        supervised.process.send_signal(number)
        assert puppet.note("shutdown")["action"] == action
        assert supervised.wait() == 42
        assert supervised.process.stdout is not None
        assert supervised.process.stdout.read() == f"the machine's end: {action}\n".encode()


def test_an_agent_that_does_not_stop_is_killed_with_everything_that_runs(supervised: Supervised) -> None:
    puppet = supervised.agent()
    live, fds = puppet.answer(supervised.spawn(puppet, "live"))
    channel.close_all(fds)
    hanging = supervised.spawn(puppet, "hang", call="hang", process="c/q")
    pid_file = supervised.directory / "hang.pid"
    eventually(lambda: pid_file.exists() and pid_file.read_text() != "", "the runtime has started another")
    supervised.process.terminate()
    assert supervised.wait() == 0
    assert puppet.ended()
    assert hanging
    for pid in (live["pid"], int(pid_file.read_text())):
        eventually(lambda pid=pid: state_of(pid) == "", "nothing runs on")  # type: ignore[misc]


def test_without_an_agent_or_anything_to_stop_it_ends_at_once(tmp_path: Path) -> None:
    with Supervised(tmp_path, env={"DRIVER_STOP_SECONDS": "30"}) as supervised:
        puppet = supervised.agent(ready=False)
        supervised.process.terminate()
        assert supervised.wait() == 0
        assert puppet.ended()


def test_an_agent_in_its_back_off_is_not_started_by_a_supervisor_that_ends(tmp_path: Path) -> None:
    with Supervised(tmp_path, env={"DRIVER_STOP_SECONDS": "30"}) as supervised:
        supervised.agent(ready=False).end(1)
        eventually(lambda: "retry_in_s" in supervised.logged(), "the agent's end is seen")
        supervised.process.terminate()
        assert supervised.wait() == 0


def test_an_agent_that_dies_while_stopping_has_a_successor_that_is_asked(tmp_path: Path) -> None:
    with Supervised(tmp_path, env={"DRIVER_STOP_SECONDS": "30"}) as supervised:
        puppet = supervised.agent()
        supervised.process.terminate()
        puppet.note("shutdown")
        puppet.end()
        successor: Puppet = supervised.agent()
        assert successor.note("shutdown")["action"] == "exit"
        channel.send(successor.channel, channel.pack([9, "stop", {"action": "exit"}]))
        assert supervised.wait() == 0


def test_an_end_that_an_agent_has_begun_goes_on_with_its_successor(tmp_path: Path) -> None:
    with Supervised(tmp_path, env={"DRIVER_STOP_SECONDS": "30"}) as supervised:
        puppet = supervised.agent()
        for wrong in (
            {"action": "sleep", "grace_ms": 1},
            {"action": "exit"},
            {"action": "exit", "grace_ms": -1},
        ):
            with pytest.raises(Refused):
                puppet.ask("stopping", wrong)
        puppet.ask("stopping", {"action": "exit", "grace_ms": 300_000})
        assert puppet.note("shutdown")["action"] == "exit"
        puppet.end()
        successor = supervised.agent()
        asked = successor.note("shutdown")
        assert asked["action"] == "exit"
        assert 200_000 < asked["grace_ms"] <= 300_000
        channel.send(successor.channel, channel.pack([9, "stop", {"action": "exit"}]))
        assert supervised.wait() == 0


def test_whoever_asks_again_with_less_grace_has_it_sooner(supervised: Supervised) -> None:
    """An agent that hangs in a shutdown of ten minutes, and then the power button."""
    puppet = supervised.agent()
    puppet.ask("stopping", {"action": "exit", "grace_ms": 600_000})
    supervised.process.terminate()
    assert supervised.wait() == 0
    assert puppet.ended()


def test_a_container_is_not_killed_because_the_agent_was_just_restarting(tmp_path: Path) -> None:
    with Supervised(tmp_path, env={"DRIVER_STOP_SECONDS": "30"}) as supervised:
        puppet = supervised.agent()
        live, fds = puppet.answer(supervised.spawn(puppet, "live"))
        channel.close_all(fds)
        puppet.end()
        successor = supervised.agent(ready=False)
        supervised.process.terminate()
        eventually(lambda: '"stopping"' in supervised.logged(), "it is told to stop")
        successor.ask("ready", {})
        assert successor.note("shutdown")["action"] == "exit"
        assert state_of(live["pid"]) not in ("", "Z")
        os.kill(live["pid"], signal.SIGTERM)
        successor.note("exit")
        channel.send(successor.channel, channel.pack([9, "stop", {"action": "exit"}]))
        assert supervised.wait() == 0
