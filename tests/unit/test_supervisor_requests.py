"""Whatever the agent asks, the supervisor answers, stays as it was, and leaks nothing."""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gcsagent.common import channel
from gcsagent.common.loop import READ
from gcsagent.supervisor.main import Supervisor
from gcsagent.supervisor.requests import MAX_CALLS, MAX_KEY, MAX_TARGET_FD
from tests.cases.descriptors import descriptors, settled_descriptors


class Agentless:
    """A supervisor in this process, with a channel and no agent: only its answers are looked at."""

    def __init__(self, state: Path) -> None:
        handlers = {
            number: signal.getsignal(number) for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT)
        }
        self._handlers = handlers
        self.supervisor = Supervisor(str(state), {}, False, "poweroff")
        self.console = str(state / "console")

    def close(self) -> None:
        signal.set_wakeup_fd(-1)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def exchange(self, messages: list[tuple[Any, int]]) -> list[list[Any]]:
        """Sends messages with so many descriptors each; returns every answer. Raises what gets out."""
        ours, theirs = channel.pair()
        self.supervisor._agent_connected(theirs)
        answers: list[list[Any]] = []
        with ours, open("/dev/null", "rb") as null:
            ours.setblocking(False)
            for message, count in messages:
                channel.send(ours, channel.pack(message), (null.fileno(),) * count)
                self.supervisor._on_channel(READ)
                answers += self._answers(ours)
            self._finish_calls()
            answers += self._answers(ours)
        self.supervisor._on_channel(READ)
        return answers

    def _answers(self, ours: socket.socket) -> list[list[Any]]:
        answers: list[list[Any]] = []
        while True:
            try:
                received = channel.receive(ours)
            except BlockingIOError:
                return answers
            if received is None:
                return answers
            channel.close_all(received[1])
            answers.append(received[0])

    def _finish_calls(self) -> None:
        reaper = self.supervisor.reaper
        for call in list(reaper.calls.values()):
            if call.result is None:
                reaper.cancel_call(call.key)
                select.select([call.pidfd], [], [], 20)
                reaper._finish_call(call)
        for process in list(reaper.processes.values()):
            signal.pidfd_send_signal(process.pidfd, signal.SIGKILL)
            select.select([process.pidfd], [], [], 20)
            reaper._finish_process(process)

    def forget_all(self) -> None:
        supervisor = self.supervisor
        supervisor.store.release(supervisor.store.names())
        supervisor.reaper.calls.clear()
        for key in list(supervisor.exits.records):
            supervisor.exits.forget(key)


@pytest.fixture
def agentless(tmp_path: Path) -> Iterator[Agentless]:
    made = Agentless(tmp_path)
    settled_descriptors()  # once, rather than for each of hypothesis's examples
    yield made
    made.forget_all()
    made.close()


GOOD_SPAWN = {"call": "c", "argv": ["true"], "env": {}, "timeout": 10}


def spawn(**changes: Any) -> tuple[str, dict[str, Any]]:
    return "spawn", {**GOOD_SPAWN, **changes}


WRONG: list[tuple[Any, Any, str]] = [
    (7, {}, "no such operation"),
    ("", {}, "no such operation"),
    ("__class__", {}, "no such operation"),
    ("x" * 100_000, {}, "no such operation"),
    (["nested"] * 1000, {}, "no such operation"),
    ("hold", None, "arguments are a map"),
    ("hold", [], "arguments are a map"),
    ("hold", {}, "hold maps names"),
    ("hold", {"hold": ["a"]}, "hold maps names"),
    ("hold", {"hold": {"": 0}}, "a name is"),
    ("hold", {"hold": {"x" * 513: 0}}, "a name is"),
    ("hold", {"hold": {b"x": 0}}, "a name is a string"),
    ("hold", {"hold": {"a": 1}}, "descriptor index"),
    ("hold", {"hold": {"a": -1}}, "descriptor index"),
    ("hold", {"hold": {"a": True}}, "descriptor index"),
    ("hold", {"hold": {"a": "0"}}, "descriptor index"),
    ("hold", {"hold": {"a": 0, "b": 0}}, "under one name"),
    ("hold", {"hold": {"taken": 0}}, "already held"),
    ("fetch", {}, "names is a list of strings"),
    ("fetch", {"names": "taken"}, "names is a list of strings"),
    ("fetch", {"names": [1]}, "names is a list of strings"),
    ("fetch", {"names": ["a\0b"]}, "names is a list of strings"),
    ("fetch", {"names": ["nothing"]}, "nothing is held"),
    ("fetch", {"names": ["y" * 100_000]}, "nothing is held"),
    ("fetch", {"names": ["taken"] * (channel.MAX_FDS + 1)}, "at most 64"),
    ("release", {"names": {"taken": 1}}, "names is a list of strings"),
    ("list", {}, "kind is a string"),
    ("list", {"kind": "secrets"}, "list takes kind"),
    ("list", {"kind": "names", "start": -1}, "list takes kind"),
    ("list", {"kind": "names", "start": "0"}, "list takes kind"),
    ("pidfd", {"process": "unknown"}, "no live process"),
    ("pidfd", {}, "process is a string"),
    ("cancel", {"call": 7}, "call is a string"),
    ("forget_call", {}, "call is a string"),
    ("forget_process", {"process": ["x"]}, "process is a string"),
    ("stop", {"action": "explode"}, "poweroff, reboot or exit"),
    ("stop", {}, "action is a string"),
    (*spawn(call=None), "call is a string"),
    (*spawn(call="x" * (MAX_KEY + 1)), "call is a string"),
    (*spawn(process="x" * (MAX_KEY + 1)), "process is a string"),
    (*spawn(process=1), "process is a string"),
    (*spawn(pid_file=1, console_path="CONSOLE/1", console_name="n"), "pid_file is a string"),
    (*spawn(argv=[]), "argv"),
    (*spawn(argv=None), "argv"),
    (*spawn(argv="true"), "argv"),
    (*spawn(argv=["true", 1]), "argv"),
    (*spawn(argv=["true\0"]), "argv"),
    (*spawn(argv=[""], console_path="CONSOLE/1", console_name="n"), "first element"),
    (*spawn(argv=["/" + "x" * 100_000]), "name too long"),
    (*spawn(argv=["/nowhere"], console_path="CONSOLE/1", console_name="n"), "No such file"),
    (*spawn(env=None), "env"),
    (*spawn(env={"A": 1}), "env"),
    (*spawn(env={"A=B": "x"}), "environment"),
    (*spawn(env={"": "x"}), "environment"),
    (*spawn(timeout=0), "timeout"),
    (*spawn(timeout=-1), "timeout"),
    (*spawn(timeout="5"), "timeout"),
    (*spawn(timeout=float("nan")), "timeout"),
    (*spawn(timeout=float("inf")), "timeout"),
    (*spawn(timeout=10**15), "timeout"),
    (*spawn(fds=[0]), "fds maps"),
    (*spawn(fds={"²": 0}), "descriptor number"),
    (*spawn(fds={"-1": 0}), "descriptor number"),
    (*spawn(fds={str(MAX_TARGET_FD + 1): 0}), "descriptor number"),
    (*spawn(fds={"9" * 5000: 0}), "descriptor number"),
    (*spawn(fds={b"1": 0}), "descriptor number"),
    (*spawn(fds={"1": 1}), "descriptor index"),
    (*spawn(hold=7), "hold maps"),
    (*spawn(console_path="/tmp/elsewhere", console_name="n"), "console socket lives in"),
    (*spawn(console_path="CONSOLE/" + "x" * 107, console_name="n"), "longer than 107"),
    (*spawn(console_path="CONSOLE/..", console_name="n"), "in use"),
    (*spawn(console_path="CONSOLE/1", console_name="taken"), "already held"),
    (*spawn(console_path="CONSOLE/1", console_name=""), "a name is"),
    (*spawn(console_path=7), "console_path is a string"),
]


@pytest.mark.parametrize("operation, arguments, says", WRONG)
def test_a_wrong_request_is_one_error_and_changes_nothing(
    agentless: Agentless, operation: Any, arguments: Any, says: str
) -> None:
    if isinstance(arguments, dict) and str(arguments.get("console_path", "")).startswith("CONSOLE"):
        arguments = {
            **arguments,
            "console_path": arguments["console_path"].replace("CONSOLE", agentless.console),
        }
    agentless.exchange([([1, "hold", {"hold": {"taken": 0}}], 1)])
    before = settled_descriptors()
    ((ident, error, result),) = agentless.exchange([([2, operation, arguments], 1)])
    assert (ident, result) == (2, None)
    assert says in error["message"]
    assert len(error["message"]) <= 4096
    assert agentless.supervisor.store.names() == ["taken"]
    assert agentless.supervisor.reaper.calls == {}
    assert os.listdir(agentless.console) == []
    assert descriptors() == before


def test_a_call_or_process_by_a_name_in_use_is_refused(agentless: Agentless) -> None:
    supervisor = agentless.supervisor
    supervisor.exits.add("c/old", {"pid": 1, "exited_at_ns": 1})
    first, again, process = agentless.exchange(
        [
            ([1, *spawn(argv=["sleep", "60"])], 0),
            ([2, *spawn()], 0),
            ([3, *spawn(call="other", process="c/old")], 0),
        ]
    )[::-1]
    assert (first[0], first[1]) == (1, None)
    assert {again[0], process[0]} == {2, 3}
    assert all("exists already" in answer[1]["message"] for answer in (again, process))


def test_calls_nobody_forgets_are_bounded(agentless: Agentless) -> None:
    reaper = agentless.supervisor.reaper
    agentless.exchange([([1, *spawn()], 0)])
    (call,) = reaper.calls.values()
    reaper.calls.update({f"old{number}": call for number in range(MAX_CALLS - 1)})
    ((_, error, _),) = agentless.exchange([([2, *spawn(call="more")], 0)])
    assert "wait to be forgotten" in error["message"]
    assert error["errno"] == errno.EAGAIN


def test_one_descriptor_too_many_is_told_from_a_wrong_name(agentless: Agentless) -> None:
    agentless.supervisor.store.limit = 1
    answers = agentless.exchange([([1, "hold", {"hold": {"a": 0}}], 1), ([2, "hold", {"hold": {"b": 0}}], 1)])
    assert (answers[0][1], answers[1][1]["errno"]) == (None, errno.EMFILE)
    ((_, error, _),) = agentless.exchange([([3, "hold", {"hold": {"a": 0}}], 1)])
    assert error["errno"] == 0


def test_a_group_of_names_is_held_whole_or_not_at_all(agentless: Agentless) -> None:
    agentless.exchange([([1, "hold", {"hold": {"b": 0}}], 1)])
    ((_, error, _),) = agentless.exchange([([2, "hold", {"hold": {"a": 0, "b": 1, "c": 2}}], 3)])
    assert "already held" in error["message"]
    assert agentless.supervisor.store.names() == ["b"]


def test_a_message_without_a_number_is_no_request_and_its_descriptors_are_closed(
    agentless: Agentless,
) -> None:
    before = settled_descriptors()
    assert agentless.exchange([([ident, "ready", {}], 5) for ident in (None, "1", 1.0, True, [1])]) == []
    assert descriptors() == before


NAMES = st.sampled_from(["a", "b", "c/p", "", "x" * 600]) | st.text(max_size=5)
ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=8) | st.binary(max_size=3), inner, max_size=4)
    ),
    max_leaves=12,
)
INDEX = st.integers(-1, 4) | ANY
# No argument vector but these: what is generated is also run.
ARGV = st.sampled_from(
    [["true"], ["false"], ["sleep", "60"], ["/nowhere"], [""], [], ["true", ""]]
) | ANY.filter(lambda value: not isinstance(value, list))
ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "call": NAMES | ANY,
        "argv": ARGV,
        "env": st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2) | ANY,
        "process": NAMES | ANY,
        "pid_file": st.sampled_from(["/dev/null", "/proc/self/stat", "/", "", "/dev/zero"]) | ANY,
        "timeout": st.floats(0.1, 5) | ANY,
        "fds": st.dictionaries(st.sampled_from(["0", "1", "63", "64", "²", "-1"]), INDEX, max_size=3) | ANY,
        "hold": st.dictionaries(NAMES, INDEX, max_size=3) | ANY,
        "console_path": st.sampled_from(["CONSOLE/1", "CONSOLE", "/1", "CONSOLE/" + "x" * 200]) | ANY,
        "console_name": NAMES | ANY,
        "names": st.lists(NAMES, max_size=4) | ANY,
        "kind": st.sampled_from(["names", "calls", "processes", "exits"]) | ANY,
        "start": st.integers(-1, 3) | ANY,
    },
)
OPERATIONS = st.sampled_from(
    [
        "spawn",
        "spawn",
        "cancel",
        "forget_call",
        "forget_process",
        "hold",
        "fetch",
        "release",
        "list",
        "pidfd",
        "ready",
    ]
)
MESSAGES = st.tuples(
    st.tuples(st.integers(0, 2**32) | ANY, OPERATIONS | ANY, ARGUMENTS | ANY).map(list), st.integers(0, 4)
)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=st.lists(MESSAGES, max_size=6))
def test_no_message_gets_an_exception_out_or_leaves_a_descriptor(
    agentless: Agentless, messages: list[tuple[list[Any], int]]
) -> None:
    for message, _ in messages:
        arguments = message[2]
        if isinstance(arguments, dict) and isinstance(path := arguments.get("console_path"), str):
            arguments["console_path"] = path.replace("CONSOLE", agentless.console)
    before = descriptors()
    answers = agentless.exchange(messages)
    asked = [message[0] for message, _ in messages if type(message[0]) is int]
    answered = [answer[0] for answer in answers if answer[0] is not None]
    assert sorted(ident for ident in answered if ident >= 0) == sorted(ident for ident in asked if ident >= 0)
    assert not Counter(answered) - Counter(asked)
    assert not [answer for answer in answers if "a fault in" in str(answer[1])]
    agentless.forget_all()
    assert os.listdir(agentless.console) == []
    assert descriptors() == before


def test_a_word_nobody_waits_for_is_answered_only_when_it_is_refused(agentless: Agentless) -> None:
    told = [([-1, "hold", {"hold": {"a": 0}}], 1), ([-2, "release", {"names": ["a", "b"]}], 0)]
    assert agentless.exchange(told) == []
    ((ident, error, result),) = agentless.exchange([([-3, "hold", {"hold": {"": 0}}], 1)])
    assert (ident, result) == (-3, None)
    assert "a name is 1 to" in error["message"]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(packet=st.binary(min_size=1, max_size=200), count=st.integers(0, 3))
def test_no_packet_gets_an_exception_out_or_leaves_a_descriptor(
    agentless: Agentless, packet: bytes, count: int
) -> None:
    before = descriptors()
    ours, theirs = channel.pair()
    agentless.supervisor._agent_connected(theirs)
    with ours, open("/dev/null", "rb") as null:
        channel.send(ours, packet, (null.fileno(),) * count)
        agentless.supervisor._on_channel(READ)
    agentless.supervisor._on_channel(READ)
    agentless.forget_all()
    assert descriptors() == before
