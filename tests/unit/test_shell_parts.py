"""The debug shell's parts: what it imports, who may connect, whose container it takes, and what is logged."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest

import gcsagent.shell
from gcsagent.common import channel
from gcsagent.common.loop import Loop
from gcsagent.shell import containers, server
from gcsagent.shell.journal import MAX_TEXT, Journal
from gcsagent.shell.server import Server
from gcsagent.supervisor import shellproc
from gcsagent.supervisor.exits import ExitRecords
from gcsagent.supervisor.reaper import Reaper
from gcsagent.supervisor.shellproc import ShellProcess
from protocol.errors import Code, RpcError
from tests.cases.descriptors import descriptors, settled_descriptors

SECONDS = 20.0
NEVER = ("asyncio", "logging", "argparse", "ptyprocess", "ctypes", "subprocess")


def test_an_idle_server_has_not_loaded_what_it_may_not_need() -> None:
    program = "import gcsagent.shell.__main__, json, sys; print(json.dumps(sorted(sys.modules)))"
    paths = [str(Path(gcsagent.shell.__file__).parents[2]), str(Path(msgpack.__file__).parents[1])]
    done = subprocess.run(
        [sys.executable, "-S", "-c", program],
        env={"PYTHONPATH": ":".join(paths)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    loaded = set(json.loads(done.stdout))
    assert "gcsagent.shell.server" in loaded
    assert loaded.isdisjoint(NEVER), sorted(loaded & set(NEVER))
    assert not [name for name in loaded if name.startswith(("gcsagent.agent", "gcsagent.supervisor"))]


# -- the record -----------------------------------------------------------------------------------


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = channel.pair()
    with ours, theirs:
        yield ours, theirs


def test_a_record_is_short_and_has_only_what_there_is(pair: tuple[socket.socket, socket.socket]) -> None:
    Journal(pair[1]).write("info", "opened", argv=("a", "b" * 9999), container=None, peer="", pid=7)
    received = channel.receive(pair[0])
    assert received is not None
    level, message, fields = received[0]
    assert (level, message, set(fields)) == ("info", "opened", {"argv", "pid"})
    assert len(fields["argv"]) == MAX_TEXT + 1


def test_what_the_supervisor_cannot_take_goes_to_standard_error(
    pair: tuple[socket.socket, socket.socket], capfd: pytest.CaptureFixture[str]
) -> None:
    journal = Journal(pair[1])
    pair[0].close()
    journal.write("warning", "refused", peer="vsock:9:1")
    assert json.loads(capfd.readouterr().err) == {
        "level": "warning",
        "name": "shell",
        "message": "refused",
        "peer": "vsock:9:1",
    }


@pytest.mark.parametrize(
    "line", [["loud", "x", {}], [1, "x", {}], ["info", 2, {}], ["info", "x", []], [None, None, None]]
)
def test_the_supervisor_logs_no_nonsense(line: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[Any] = []
    monkeypatch.setattr(shellproc, "log", lambda *words, **fields: lines.append((words, fields)))
    shellproc._log_line(line)
    assert lines == []
    shellproc._log_line(["info", "x" * 999, {"name": "supervisor", "time": 1, "shell": "s"}])
    assert lines == [(("info", "x" * shellproc.MAX_MESSAGE), {"shell": "s", "name": "shell"})]


# -- who may connect ------------------------------------------------------------------------------


class FakeListener:
    """Stands for a vsock listener: no real one is made here, where it would lead to the hypervisor."""

    def __init__(self, cid: int) -> None:
        self.theirs, ours = socket.socketpair()
        self.family = socket.AF_VSOCK
        self._accepted = FakeVsock(ours), (cid, 99)

    def accept(self) -> tuple[Any, tuple[int, int]]:
        return self._accepted


class FakeVsock:
    family = socket.AF_VSOCK

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


@pytest.mark.parametrize(
    "cid, allowed, let_in", [(2, 2, True), (1, 2, False), (3, 2, False), (1, None, True)]
)
def test_only_the_host_may_connect(
    pair: tuple[socket.socket, socket.socket], cid: int, allowed: int | None, let_in: bool
) -> None:
    listener: Any = FakeListener(cid)
    served = Server(
        Loop(), listener, Journal(pair[1]), state="/", peer_cid=allowed, supervisor=1, generation=1
    )
    served._accept()
    assert len(served._sessions) == let_in
    if let_in:
        next(iter(served._sessions)).close()
    else:
        received = channel.receive(pair[0])
        assert received is not None
        assert received[0][1] == "a peer that is not the host was refused a shell"
        assert received[0][2]["peer"] == f"({cid}, 99)"
    assert listener.theirs.recv(1) == b""
    listener.theirs.close()


def test_of_those_who_do_not_say_hello_the_oldest_gives_way(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "MAX_STRANGERS", 2)
    listeners: list[Any] = [FakeListener(2) for _ in range(3)]
    served = Server(Loop(), listeners[0], Journal(pair[1]), state="/", peer_cid=2, supervisor=1, generation=1)
    for listener in listeners:
        served._listener = listener
        served._accept()
    assert len(served._sessions) == 2
    assert listeners[0].theirs.recv(1) == b""
    for each in list(served._sessions):
        each.close()
    for listener in listeners:
        listener.theirs.close()


# -- whose container ------------------------------------------------------------------------------


def container(state: Path, pid: object, cgroup: str) -> str:
    directory = state / "containers" / "web"
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"linux": {"cgroupsPath": cgroup}}))
    (directory / "init.pid").write_text(str(pid))
    (directory / str(pid)).mkdir()
    return str(state)


def own_cgroup() -> str:
    return Path("/proc/self/cgroup").read_text().splitlines()[0].split(":", 2)[2]


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "1000"]) as process:
        yield process
        process.kill()


def test_a_child_in_the_right_cgroup_is_the_containers_init(
    tmp_path: Path, child: subprocess.Popen[bytes]
) -> None:
    place = containers.find(container(tmp_path, child.pid, own_cgroup()), "web", os.getpid())
    assert (place.pid, place.namespaces, place.ends()) == (child.pid, 0, False)
    child.kill()
    child.wait()
    assert place.ends()
    place.close()


@pytest.mark.parametrize(
    "init, cgroup, supervisor",
    [
        (lambda child: child.pid, "/of-another", os.getpid),
        (lambda child: child.pid, None, lambda: 1),
        (lambda child: "rubbish", None, os.getpid),
        (lambda child: 2**30, None, os.getpid),
    ],
)
def test_a_pid_that_may_be_somebody_elses_is_nobodys(
    tmp_path: Path,
    child: subprocess.Popen[bytes],
    init: Callable[[Any], object],
    cgroup: str | None,
    supervisor: Callable[[], int],
) -> None:
    state = container(tmp_path, init(child), cgroup or own_cgroup())
    before = settled_descriptors()
    with pytest.raises(RpcError) as caught:
        containers.find(state, "web", supervisor())
    assert (caught.value.code, caught.value.details["field"]) == (Code.FAILED_PRECONDITION, "container")
    assert descriptors() == before


def test_what_a_container_lacks_in_its_environment_is_the_usual() -> None:
    found = containers._environment({"process": {"env": ["PATH=/bin", "A=b"]}})
    assert found == ("HOME=/root", "PATH=/bin", "A=b")
    assert containers._environment({})[0].startswith("PATH=")


# -- PID 1's part ---------------------------------------------------------------------------------


class Watched:
    """A ShellProcess of ours whose server is a script."""

    def __init__(self, tmp_path: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, program = tmp_path / "shell", tmp_path / "python"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))
        self.loop = Loop()
        exits = ExitRecords(self.loop, str(tmp_path / "exits"))
        reaper = Reaper(self.loop, exits, lambda _call: None, lambda _key, _record: None)
        self.own = reaper.own
        self.process = ShellProcess(
            self.loop, reaper, {"PATH": os.environ["PATH"]}, f"unix:{self.path}", self.loop.stop
        )

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(str(self.path))
        return sock

    def run_until(self, holds: Callable[[], bool]) -> None:
        def look() -> None:
            if holds():
                self.loop.stop()
            else:
                self.loop.after(0.005, look)

        if not holds():
            limit = self.loop.after(SECONDS, self.loop.stop)
            self.loop.after(0, look)
            self.loop._running = True
            self.loop.run()
            limit.cancel()
            assert holds()


def test_nothing_runs_until_somebody_connects_and_failures_back_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    watched = Watched(tmp_path, f"echo run >> {runs}; exit 3", monkeypatch)
    assert watched.process.pid == 0
    with watched.connect():
        watched.run_until(lambda: runs.exists() and len(runs.read_text().split()) == 3)
        watched.run_until(lambda: not watched.process.pid)
    watched.process.stop()
    assert watched.process._failures == 3
    assert watched.own == set()
    assert not watched.path.exists()
    assert capfd.readouterr().err.count("the debug shell's process failed") == 3


def test_it_is_told_to_end_and_its_end_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = tmp_path / "started"
    watched = Watched(
        tmp_path, f"trap 'exit 0' TERM; echo > {started}; while :; do sleep 0.01; done", monkeypatch
    )
    with watched.connect():
        watched.run_until(started.exists)
        assert watched.own == {watched.process.pid}
        watched.process.stop()
        watched.loop._running = True
        watched.loop.run()  # until it says that it has ended
    assert (watched.process.pid, watched.own) == (0, set())


def test_a_server_that_cannot_be_started_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    watched = Watched(tmp_path, "exit 0", monkeypatch)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with watched.connect():
        watched.run_until(lambda: watched.process._failures == 2)
    watched.process.stop()
    assert "the debug shell cannot be started" in capfd.readouterr().err


def test_a_server_there_are_no_descriptors_for_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is PID 1 that has run out of them, and PID 1 must not end of that."""
    watched = Watched(tmp_path, "exit 0", monkeypatch)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with watched.connect():
        lowest = os.open("/dev/null", os.O_RDONLY)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
        try:
            watched.run_until(lambda: watched.process._failures == 2)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    watched.process.stop()
    assert "the debug shell cannot be started" in capfd.readouterr().err
