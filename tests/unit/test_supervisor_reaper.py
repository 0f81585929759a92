"""Runtime calls and the processes they start: no exit is lost, whenever it comes, and no zombie stays."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gcsagent.common.loop import Loop
from gcsagent.supervisor.exits import ExitRecords
from gcsagent.supervisor.reaper import Call, Reaper
from tests.fakes import tracer
from tests.fakes.supervised import Puppet, Refused, Supervised, eventually, state_of


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[Supervised]:
    with Supervised(tmp_path) as made:
        yield made


@pytest.fixture
def puppet(supervised: Supervised) -> Puppet:
    return supervised.agent()


class Lines:
    """A pipe for a runtime's standard output; what it says is waited for."""

    def __init__(self) -> None:
        self.read_end, self.write_end = os.pipe()

    def sent(self) -> dict[str, Any]:
        return {"fds": {"1": 0}, "sent": (self.write_end,)}

    def next(self) -> list[str]:
        os.set_blocking(self.read_end, True)
        line = os.read(self.read_end, 100).decode()
        assert line.endswith("\n")
        return line.split()


@pytest.fixture
def lines() -> Iterator[Lines]:
    made = Lines()
    yield made
    os.close(made.read_end)
    os.close(made.write_end)


def exit_code(record: dict[str, Any]) -> int:
    return os.waitstatus_to_exitcode(record["status"])


# -- claims -----------------------------------------------------------------------------------------


def test_a_live_process_is_answered_with_a_pidfd_and_its_end_is_told_and_kept(
    supervised: Supervised, puppet: Puppet
) -> None:
    result, (pidfd,) = puppet.answer(supervised.spawn(puppet, "live"))
    assert (result["status"], result["timed_out"], result["exit"]) == (0, False, None)
    assert puppet.ask("list", {"kind": "processes"}) == [["c/p", result["pid"]]]
    again, (other,) = puppet.answer(puppet.send("pidfd", {"process": "c/p"}))
    assert again == result["pid"]
    signal.pidfd_send_signal(pidfd, signal.SIGTERM)
    os.close(pidfd)
    os.close(other)
    record = puppet.note("exit")
    assert (record["process"], record["pid"], exit_code(record)) == ("c/p", result["pid"], -signal.SIGTERM)
    assert puppet.ask("list", {"kind": "processes"}) == []
    ((key, kept),) = puppet.ask("list", {"kind": "exits"})
    assert (key, kept["status"]) == ("c/p", record["status"])
    assert len(os.listdir(supervised.state / "exits")) == 1
    puppet.ask("forget_process", {"process": "c/p"})
    assert puppet.ask("list", {"kind": "exits"}) == []
    assert os.listdir(supervised.state / "exits") == []
    assert state_of(result["pid"]) == ""


def test_the_exit_of_a_process_that_died_before_its_pid_was_known_is_not_lost(
    supervised: Supervised, puppet: Puppet, lines: Lines
) -> None:
    for status in range(10):
        call = f"call{status}"
        ident = supervised.spawn(puppet, "dead", str(status), call=call, **lines.sent())
        word, pid = lines.next()
        result, fds = puppet.answer(ident)
        assert (word, int(pid), fds) == ("dead", result["pid"], [])
        assert exit_code(result["exit"]) == status
        assert puppet.note("exit")["status"] == result["exit"]["status"]
        assert state_of(int(pid)) == ""
        puppet.ask("forget_process", {"process": "c/p"})
        puppet.ask("forget_call", {"call": call})


def test_an_orphan_is_reaped_when_nobody_can_claim_it(
    supervised: Supervised, puppet: Puppet, lines: Lines
) -> None:
    """No call that names a process is running: the dead one is nobody's."""
    ident = supervised.spawn(puppet, "dead", "1", process="", **lines.sent())
    _, pid = lines.next()
    puppet.answer(ident)
    eventually(lambda: state_of(int(pid)) == "", "the orphan is reaped")


@pytest.mark.parametrize("answer", ["name", "nobody"])
def test_an_unknown_zombie_is_held_for_a_call_under_way_and_no_longer(
    supervised: Supervised, puppet: Puppet, lines: Lines, answer: str
) -> None:
    go = supervised.directory / "go"
    os.mkfifo(go)
    ident = supervised.spawn(puppet, "hold", str(go), **lines.sent())
    _, pid = lines.next()
    puppet.answer(supervised.spawn(puppet, "text", "", call="other", process=""))  # another one's end
    assert state_of(int(pid)) == "Z"
    with open(go, "w") as file:
        file.write(answer)
    result, _ = puppet.answer(ident)
    if answer == "name":
        assert result["pid"] == int(pid)
        assert exit_code(result["exit"]) == 9
    else:
        assert result["pid"] == 0
        assert result["exit"] is None
    eventually(lambda: state_of(int(pid)) == "", "the zombie is reaped")


def test_a_zombie_is_not_held_for_a_call_that_began_after_it(
    supervised: Supervised, puppet: Puppet, lines: Lines
) -> None:
    """Only calls under way when it was first seen may name it: the second one does not prolong the hold."""
    paths = [supervised.directory / name for name in ("first", "second")]
    for path in paths:
        os.mkfifo(path)
    first = supervised.spawn(puppet, "hold", str(paths[0]), call="1", process="c/1", **lines.sent())
    _, old = lines.next()
    eventually(lambda: state_of(int(old)) == "Z", "the first one's child has ended")
    puppet.ask("list", {"kind": "calls"})
    puppet.answer(supervised.spawn(puppet, "text", "", call="seen", process=""))
    second = supervised.spawn(puppet, "hold", str(paths[1]), call="2", process="c/2", **lines.sent())
    _, young = lines.next()
    paths[0].write_text("nobody")
    puppet.answer(first)
    eventually(lambda: state_of(int(old)) == "", "the older zombie is reaped")
    assert state_of(int(young)) == "Z"
    paths[1].write_text("nobody")
    puppet.answer(second)
    eventually(lambda: state_of(int(young)) == "", "the younger zombie is reaped")


# -- traced -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def traced(pid: int) -> Iterator[None]:
    command = [sys.executable, "-S", tracer.__file__, str(pid)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"traced\n"
            yield
        finally:
            process.kill()


def killed(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: state_of(pid) == "Z", "it has ended")


def test_a_process_whose_tracer_does_not_let_go_of_it_keeps_nobody_waiting(
    supervised: Supervised, puppet: Puppet
) -> None:
    """Any process of a container may trace another, and see it end before its parent does."""
    result, (pidfd,) = puppet.answer(supervised.spawn(puppet, "live"))
    os.close(pidfd)
    with traced(result["pid"]):
        killed(result["pid"])
        assert puppet.ask("list", {"kind": "processes"}) == [["c/p", result["pid"]]]
        assert puppet.ask("list", {"kind": "exits"}) == []
    record = puppet.note("exit")
    assert (record["process"], record["pid"], exit_code(record)) == ("c/p", result["pid"], -signal.SIGKILL)
    assert state_of(result["pid"]) == ""
    assert puppet.ask("list", {"kind": "processes"}) == []


def test_a_traced_call_ends_when_its_tracer_lets_go_of_it(supervised: Supervised, puppet: Puppet) -> None:
    ident = puppet.send("spawn", {"call": "x", "argv": ["sleep", "100000"]})
    assert puppet.ask("list", {"kind": "calls"}) == [["x", None]]
    (pid,) = set(supervised.children()) - {puppet.pid}
    with traced(pid):
        killed(pid)
        assert puppet.ask("list", {"kind": "calls"}) == [["x", None]]
    result, _ = puppet.answer(ident)
    assert os.waitstatus_to_exitcode(result["status"]) == -signal.SIGKILL
    assert state_of(pid) == ""


def test_exits_are_recorded_while_a_tracer_keeps_a_dead_agent(supervised: Supervised, puppet: Puppet) -> None:
    result, (pidfd,) = puppet.answer(supervised.spawn(puppet, "live"))
    with traced(puppet.pid):
        puppet.end()
        eventually(lambda: state_of(puppet.pid) == "Z", "the agent has ended")
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        eventually(lambda: len(os.listdir(supervised.state / "exits")) == 1, "the exit is recorded")
    os.close(pidfd)
    successor = supervised.agent()
    ((key, record),) = successor.ask("list", {"kind": "exits"})
    assert (key, record["pid"]) == ("c/p", result["pid"])


def test_a_traced_end_is_not_looked_at_again_before_something_has_changed(tmp_path: Path) -> None:
    loop, ended, looks = Loop(), list[Call](), list[int]()
    reaper = Reaper(loop, ExitRecords(loop, str(tmp_path / "exits")), ended.append, lambda *_: None)
    call = reaper.start_call("x", ["sleep", "100000"], dict(os.environ), {}, timeout=60)

    def look(events: int) -> None:
        looks.append(events)
        reaper._finish_call(call)

    loop.watch(call.pidfd, look)
    with traced(call.pid):
        killed(call.pid)
        loop.after(0.1, loop.stop)
        loop.run()
        assert (len(looks), ended) == (1, [])
    reaper.on_child()
    assert ended == [call]
    assert call.result is not None


# -- pid files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "no pid"),
        ("rubbish", "no pid"),
        ("-1", "no pid"),
        ("0", "no pid"),
        ("1", "not our child"),
        ("²", "pid file"),
        ("9" * 40, "no pid"),
        ("2147483647", "not our child"),
        ("4294967296", "no pid"),
    ],
)
def test_a_pid_file_that_names_no_child_claims_nothing(
    supervised: Supervised, puppet: Puppet, text: str, says: str
) -> None:
    result, fds = puppet.answer(supervised.spawn(puppet, "text", text))
    assert (result["status"], result["pid"], result["exit"], fds) == (0, 0, None, [])
    assert says in result["pid_error"]
    assert puppet.ask("list", {"kind": "processes"}) == []


def test_a_missing_pid_file_a_directory_and_a_fifo_nobody_writes_claim_nothing_and_hang_nothing(
    supervised: Supervised, puppet: Puppet
) -> None:
    os.mkfifo(supervised.directory / "fifo")
    for number, name in enumerate(("missing", "state", "fifo")):
        path = str(supervised.directory / name)
        arguments = {"call": f"{number}", "argv": ["true"], "process": "c/p", "pid_file": path}
        result, _ = puppet.answer(puppet.send("spawn", arguments))
        assert (result["status"], result["pid"]) == (0, 0)
        assert "pid file" in result["pid_error"]


def test_a_pid_file_cannot_name_the_agent_another_process_or_the_supervisor(
    supervised: Supervised, puppet: Puppet
) -> None:
    live, fds = puppet.answer(supervised.spawn(puppet, "live"))
    for number, pid in enumerate((puppet.pid, live["pid"])):
        result, _ = puppet.answer(
            supervised.spawn(puppet, "text", str(pid), call=f"other{number}", process="c/q")
        )
        assert result["pid"] == 0
        assert "another's already" in result["pid_error"]
    result, _ = puppet.answer(
        supervised.spawn(puppet, "text", str(supervised.process.pid), call="self", process="c/q")
    )
    assert "not our child" in result["pid_error"]
    signal.pidfd_send_signal(fds[0], signal.SIGKILL)
    os.close(fds[0])
    assert puppet.note("exit")["process"] == "c/p"


def test_two_calls_cannot_claim_one_process(supervised: Supervised, puppet: Puppet, lines: Lines) -> None:
    first = supervised.spawn(puppet, "hang", call="1", **lines.sent())
    lines.next()
    with pytest.raises(Refused, match="c/p exists already"):
        puppet.answer(supervised.spawn(puppet, "live", call="2"))
    puppet.ask("cancel", {"call": "1"})
    result, (pidfd,) = puppet.answer(first)
    assert puppet.ask("list", {"kind": "processes"}) == [["c/p", result["pid"]]]
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    os.close(pidfd)
    puppet.note("exit")
    with pytest.raises(Refused, match="c/p exists already"):
        puppet.answer(supervised.spawn(puppet, "live", call="2"))


def test_orphans_are_reaped_without_a_descriptor_to_spare(
    supervised: Supervised, puppet: Puppet, lines: Lines
) -> None:
    """And PID 1 does not end of that."""
    script = "setsid sleep 100000 >/dev/null & echo orphan $!"
    argv = ["/bin/sh", "-c", script]
    puppet.ask("spawn", {"call": "x", "argv": argv, "fds": {"1": 0}}, (lines.write_end,))
    _, orphan = lines.next()
    supervisor = supervised.process.pid
    used = {int(name) for name in os.listdir(f"/proc/{supervisor}/fd")}
    lowest = min(set(range(len(used) + 1)) - used)
    soft, hard = resource.prlimit(supervisor, resource.RLIMIT_NOFILE)
    resource.prlimit(supervisor, resource.RLIMIT_NOFILE, (lowest, hard))
    os.kill(int(orphan), signal.SIGKILL)
    eventually(lambda: state_of(int(orphan)) == "", "the orphan is reaped")
    resource.prlimit(supervisor, resource.RLIMIT_NOFILE, (soft, hard))
    assert puppet.ask("list", {"kind": "processes"}) == []


# -- calls ------------------------------------------------------------------------------------------


def test_a_failing_call_is_its_status(supervised: Supervised, puppet: Puppet) -> None:
    result, _ = puppet.answer(supervised.spawn(puppet, "fail"))
    assert os.waitstatus_to_exitcode(result["status"]) == 3
    assert result["pid"] == 0


def test_a_call_past_its_deadline_is_killed_and_what_it_started_is_still_known(
    supervised: Supervised, puppet: Puppet, lines: Lines
) -> None:
    ident = supervised.spawn(puppet, "hang", timeout=0.5, **lines.sent())
    _, pid = lines.next()
    result, (pidfd,) = puppet.answer(ident)
    assert result["timed_out"] is True
    assert os.waitstatus_to_exitcode(result["status"]) == -signal.SIGKILL
    assert result["pid"] == int(pid)
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    os.close(pidfd)
    assert exit_code(puppet.note("exit")) == -signal.SIGKILL


def test_a_cancelled_call_is_killed_and_answered(
    supervised: Supervised, puppet: Puppet, lines: Lines
) -> None:
    ident = supervised.spawn(puppet, "hang", **lines.sent())
    lines.next()
    puppet.ask("cancel", {"call": "call"})
    result, (pidfd,) = puppet.answer(ident)
    assert result["timed_out"] is False
    assert os.waitstatus_to_exitcode(result["status"]) == -signal.SIGKILL
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    os.close(pidfd)
    puppet.note("exit")
    puppet.ask("cancel", {"call": "call"})  # too late, and no matter
    puppet.ask("forget_call", {"call": "call"})
    puppet.ask("cancel", {"call": "unknown"})


def test_a_call_forgotten_while_it_runs_is_answered_and_gone_when_it_ends(
    supervised: Supervised, puppet: Puppet, lines: Lines
) -> None:
    ident = supervised.spawn(puppet, "hang", **lines.sent())
    lines.next()
    puppet.ask("forget_call", {"call": "call"})
    assert [key for key, _ in puppet.ask("list", {"kind": "calls"})] == ["call"]
    puppet.ask("cancel", {"call": "call"})
    _, (pidfd,) = puppet.answer(ident)
    assert puppet.ask("list", {"kind": "calls"}) == []
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    os.close(pidfd)
    puppet.note("exit")


def test_what_a_failed_call_leaves_running_in_its_session_is_killed(
    supervised: Supervised, puppet: Puppet
) -> None:
    read_end, write_end = os.pipe()
    script = "sleep 100000 & exit 3"
    ident = puppet.send(
        "spawn", {"call": "x", "argv": ["/bin/sh", "-c", script], "fds": {"1": 0}}, (write_end,)
    )
    os.close(write_end)
    result, _ = puppet.answer(ident)
    assert os.waitstatus_to_exitcode(result["status"]) == 3
    assert select.select([read_end], [], [], 20)[0], "it lives and holds the pipe"
    assert os.read(read_end, 1) == b""
    os.close(read_end)


def test_a_program_that_is_not_there_is_refused_with_its_errno_and_nothing_is_kept(
    supervised: Supervised, puppet: Puppet
) -> None:
    before = supervised.descriptors()
    with open("/dev/null", "rb") as null, pytest.raises(Refused, match="/nowhere") as caught:
        puppet.ask(
            "spawn",
            {"call": "x", "argv": ["/nowhere"], "hold": {"kept": 0}, "console_path": "", "fds": {"1": 0}},
            (null.fileno(),),
        )
    assert caught.value.errno == 2
    assert puppet.ask("list", {"kind": "calls"}) == []
    assert puppet.ask("list", {"kind": "names"}) == []
    assert supervised.descriptors() == before


def test_a_finished_call_is_kept_until_forgotten_whoever_asked(
    supervised: Supervised, puppet: Puppet, lines: Lines
) -> None:
    supervised.spawn(puppet, "hang", **lines.sent())
    _, pid = lines.next()
    puppet.end()
    successor = supervised.agent()
    assert successor.ask("list", {"kind": "calls"}) == [["call", None]]
    successor.ask("cancel", {"call": "call"})
    eventually(
        lambda: successor.ask("list", {"kind": "calls"})[0][1] is not None, "the call's result is kept"
    )
    assert successor.ask("list", {"kind": "processes"}) == [["c/p", int(pid)]]
    assert successor.ask("list", {"kind": "calls"})[0][1]["pid"] == int(pid)
    os.kill(int(pid), signal.SIGKILL)
    assert successor.note("exit")["pid"] == int(pid)


def test_a_child_inherits_nothing_that_is_held(supervised: Supervised, puppet: Puppet) -> None:
    read_end, write_end = os.pipe()
    puppet.ask("hold", {"hold": {"write": 0}}, (write_end,))
    live, (pidfd,) = puppet.answer(supervised.spawn(puppet, "live"))
    os.close(write_end)
    puppet.ask("release", {"names": ["write"]})
    assert select.select([read_end], [], [], 20)[0], "the last writer is gone: the live child has none"
    assert os.read(read_end, 1) == b""
    os.close(read_end)
    inherited = {os.readlink(f"/proc/{live['pid']}/fd/{fd}") for fd in os.listdir(f"/proc/{live['pid']}/fd")}
    assert not [name for name in inherited if name.startswith(("socket:", "anon_inode:[eventpoll]"))]
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    os.close(pidfd)
    puppet.note("exit")


def test_the_terminal_a_runtime_sends_is_held_under_its_name(supervised: Supervised, puppet: Puppet) -> None:
    path = str(supervised.state / "console" / "7")
    extra = {"console_path": path, "console_name": "fd/c/p/tty"}
    result, (pidfd,) = puppet.answer(supervised.spawn(puppet, "console", path, **extra))
    assert result["status"] == 0
    _, (master,) = puppet.answer(puppet.send("fetch", {"names": ["fd/c/p/tty"]}))
    assert os.isatty(master)
    assert not os.path.exists(path)
    for fd in (master, pidfd):
        os.close(fd)
    os.kill(result["pid"], signal.SIGKILL)
    puppet.note("exit")


def test_nothing_stays_of_many_calls(supervised: Supervised, puppet: Puppet) -> None:
    before = supervised.descriptors()
    for number in range(25):
        result, (pidfd,) = puppet.answer(supervised.spawn(puppet, "live", call=str(number)))
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)
        puppet.note("exit")
        puppet.ask("forget_process", {"process": "c/p"})
        puppet.ask("forget_call", {"call": str(number)})
        assert result["status"] == 0
    assert supervised.descriptors() == before
    assert supervised.children() == [puppet.pid]


def test_the_longest_ids_are_started_held_and_recorded(supervised: Supervised, puppet: Puppet) -> None:
    key = f"{'c' * 128}/{'p' * 128}"
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ident = supervised.spawn(
            puppet, "live", process=key, hold={f"fd/{key}/stdout": 0}, sent=(theirs.fileno(),)
        )
    result, (pidfd,) = puppet.answer(ident)
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    os.close(pidfd)
    assert puppet.note("exit")["process"] == key
    assert len(os.listdir(supervised.state / "exits")) == 1
    assert puppet.ask("list", {"kind": "names"}) == [f"fd/{key}/stdout"]
    assert "pid_error" not in result
