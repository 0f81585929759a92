"""sd_notify against a real datagram socket, and the unit file that relies on it."""

from __future__ import annotations

import configparser
import contextlib
import os
import re
import select
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

import gcsagent
from gcsagent.common.loop import Loop
from gcsagent.options import parse
from gcsagent.supervisor.notify import Notifier
from tests.fakes.supervised import SECONDS, Supervised


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """A service manager's socket, and how NOTIFY_SOCKET names it."""
    name = f"{tmp_path}/notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(name if request.param == "path" else f"\0{name}")
        listening.settimeout(SECONDS)
        yield listening, name if request.param == "path" else f"@{name}"


def test_a_service_manager_hears_of_the_whole_life(
    tmp_path: Path, manager: tuple[socket.socket, str]
) -> None:
    listening, address = manager
    with Supervised(tmp_path, env={"NOTIFY_SOCKET": address, "DRIVER_STOP_SECONDS": "30"}) as supervised:
        first = supervised.agent(ready=False)
        first.ask("ready", {})
        assert listening.recv(4096) == b"READY=1\nSTATUS=serving, agent generation 1"
        first.end()
        assert listening.recv(4096) == b"STATUS=the agent ended with status -9; starting the next one"
        second = supervised.agent()
        assert listening.recv(4096) == b"READY=1\nSTATUS=serving, agent generation 2"
        supervised.process.terminate()
        assert listening.recv(4096).startswith(b"STOPPING=1\n")
        second.note("shutdown")
        second.send("stop", {"action": "exit"})
        assert supervised.wait() == 0


def test_the_managers_watchdog_is_told_as_long_as_the_loop_goes_round(
    tmp_path: Path, manager: tuple[socket.socket, str]
) -> None:
    listening, address = manager
    with Supervised(tmp_path, env={"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "200000"}) as supervised:
        supervised.agent(ready=False)
        assert [listening.recv(4096) for _ in range(5)] == [b"WATCHDOG=1"] * 5
        supervised.process.send_signal(signal.SIGSTOP)
        while select.select([listening], [], [], 0.5)[0]:  # five times as long as between two words
            listening.recv(4096)
        supervised.process.send_signal(signal.SIGCONT)
        assert listening.recv(4096) == b"WATCHDOG=1"


def test_children_do_not_inherit_the_socket(
    monkeypatch: pytest.MonkeyPatch, manager: tuple[socket.socket, str]
) -> None:
    for name, value in (
        ("NOTIFY_SOCKET", manager[1]),
        ("WATCHDOG_USEC", "1000000"),
        ("WATCHDOG_PID", str(os.getpid())),
    ):
        monkeypatch.setenv(name, value)
    with contextlib.closing(Notifier(Loop())) as notifier:
        assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} & set(os.environ)
        notifier.status("two\nlines")
    assert manager[0].recv(4096) == b"WATCHDOG=1"
    assert manager[0].recv(4096) == b"STATUS=two lines"


def test_a_watchdog_meant_for_another_process_is_not_ours(
    monkeypatch: pytest.MonkeyPatch, manager: tuple[socket.socket, str]
) -> None:
    for name, value in (("NOTIFY_SOCKET", manager[1]), ("WATCHDOG_USEC", "1000"), ("WATCHDOG_PID", "1")):
        monkeypatch.setenv(name, value)
    with contextlib.closing(Notifier(Loop())) as notifier:
        notifier.status("quiet")
    assert manager[0].recv(4096) == b"STATUS=quiet"


@pytest.mark.parametrize("address", ["", "/nowhere/notify", "vsock-stream:2:1", "@nobody-listens-there"])
def test_no_manager_is_no_fault(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    notifier = Notifier(Loop())
    notifier.ready("serving")
    notifier.stopping()


def test_a_manager_that_does_not_read_holds_nothing_up(
    monkeypatch: pytest.MonkeyPatch, manager: tuple[socket.socket, str]
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", manager[1])
    with contextlib.closing(Notifier(Loop())) as notifier:
        for _ in range(10_000):
            notifier.status("x" * 1000)


# -- the unit ---------------------------------------------------------------------------------------


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=True)
    parser.optionxform = str  # type: ignore[method-assign, assignment]
    parser.read_string((Path(gcsagent.__file__).parent / "data" / "gcsagent.service").read_text())
    return parser


def test_the_units_command_line_is_one_we_take() -> None:
    program, *arguments = unit()["Service"]["ExecStart"].split()
    assert program == "gcsagent"
    settings = parse(arguments)
    runtime_directory = f"/run/{unit()['Service']['RuntimeDirectory']}/"
    assert settings.state.startswith(runtime_directory)
    assert settings.listen[0].removeprefix("unix:").startswith(runtime_directory)
    assert settings.watchdog == 15


def test_the_unit_leaves_containers_to_the_supervisor() -> None:
    service = unit()["Service"]
    assert (service["Type"], service["NotifyAccess"]) == ("notify", "main")
    assert (service["KillMode"], service["Delegate"]) == ("process", "yes")
    assert re.fullmatch(r"\d+", service["TimeoutStopSec"])
    assert int(service["TimeoutStopSec"]) > 40
