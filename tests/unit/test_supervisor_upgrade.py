"""The supervisor's part of an upgrade: which code the next agent runs, and when the old one comes back."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gcsagent.common import channel
from gcsagent.supervisor.upgrade import LOOP
from tests.fakes.supervised import Puppet, Refused, Supervised, eventually


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[Supervised]:
    with Supervised(tmp_path) as made:
        yield made


def code(supervised: Supervised, name: str = "new") -> str:
    path = supervised.state / "code" / name
    (path / "gcsagent").mkdir(parents=True)
    return str(path)


def code_of(puppet: Puppet) -> tuple[str, str]:
    """GCS_CODE and the first entry of PYTHONPATH."""
    words = Path(f"/proc/{puppet.pid}/environ").read_bytes().decode().split("\0")
    env = dict(word.split("=", 1) for word in words if "=" in word)
    return env["GCS_CODE"], env["PYTHONPATH"].split(":")[0]


def alive(puppet: Puppet) -> None:
    channel.send(puppet.channel, channel.pack([None, "alive", {}]))


def begin(supervised: Supervised, puppet: Puppet, seconds: float = 20.0, name: str = "new") -> str:
    path = code(supervised, name)
    puppet.ask("upgrade", {"path": path, "seconds": seconds})
    return path


def status(puppet: Puppet) -> dict[str, Any]:
    found: dict[str, Any] = puppet.ask("upgrade_status", {})
    return found


def test_the_next_agent_runs_the_new_code_and_is_promoted_when_it_is_alive_behind_ready(
    supervised: Supervised,
) -> None:
    old = supervised.agent()
    assert status(old) == {"state": "none", "error": "", "path": "", "running": ""}
    ours, theirs = socket.socketpair()
    with ours, theirs:
        old.ask("hold", {"hold": {"conn": 0}}, (theirs.fileno(),))
    path = begin(supervised, old)
    assert status(old)["state"] == "trying"
    old.end(0)
    new = supervised.agent(ready=False)
    assert code_of(new) == (path, path)
    alive(new)
    assert status(new)["state"] == "trying"
    new.ask("ready", {})
    assert status(new)["state"] == "trying"
    alive(new)
    promoted = {"state": "promoted", "error": "", "path": path, "running": path}
    assert new.note("upgrade") == promoted
    assert new.ask("list", {"kind": "names"}) == ["conn"]
    new.end()
    successor = supervised.agent()
    assert code_of(successor) == (path, path)
    assert status(successor) == promoted


def test_an_agent_that_does_not_go_is_made_to(supervised: Supervised) -> None:
    old = supervised.agent()
    path = begin(supervised, old)
    assert old.ended()
    assert code_of(supervised.agent(ready=False))[0] == path


@pytest.mark.parametrize("ready", [False, True])
def test_new_code_that_ends_is_rolled_back_at_once(supervised: Supervised, ready: bool) -> None:
    old = supervised.agent()
    path = begin(supervised, old)
    old.end(0)
    supervised.agent(ready=ready).end(3)
    back = supervised.agent()
    assert code_of(back)[0] == ""
    when = "before it said it is alive" if ready else "before it was ready"
    assert status(back) == {
        "state": "rolled_back",
        "error": f"the new code ended with status 3 {when}; the log has why",
        "path": path,
        "running": "",
    }
    assert "retry_in_s" not in supervised.logged()  # no crash loop of the old code's


@pytest.mark.parametrize("ready", [False, True])
def test_new_code_that_hangs_is_aborted_and_rolled_back(supervised: Supervised, ready: bool) -> None:
    old = supervised.agent()
    begin(supervised, old, seconds=3.0)
    old.end(0)
    hanging = supervised.agent(ready=ready)
    assert hanging.ended()
    back = supervised.agent()
    assert code_of(back)[0] == ""
    what = "say it is alive" if ready else "become ready"
    assert status(back)["error"] == f"the new code did not {what} within 3 s"
    assert "Fatal Python error: Aborted" in supervised.logged()


def test_what_comes_back_is_the_code_that_was_promoted_last(supervised: Supervised) -> None:
    first = supervised.agent()
    good = begin(supervised, first, name="good")
    first.end(0)
    second = supervised.agent()
    alive(second)
    assert second.note("upgrade")["state"] == "promoted"
    begin(supervised, second, name="bad")
    second.end(0)
    supervised.agent(ready=False).end(1)
    third = supervised.agent()
    assert code_of(third)[0] == good
    assert (status(third)["state"], status(third)["running"]) == ("rolled_back", good)


def promote(supervised: Supervised, name: str) -> Puppet:
    old = supervised.agent()
    begin(supervised, old, name=name)
    old.end(0)
    new = supervised.agent()
    alive(new)
    assert new.note("upgrade")["state"] == "promoted"
    return new


def test_promoted_code_that_ends_again_and_again_before_it_is_ready_gives_way_to_what_was_installed(
    supervised: Supervised,
) -> None:
    promote(supervised, "good").end(0)
    new = promote(supervised, "new")
    running = status(new)["running"]
    for end in range(LOOP + 1):  # the first of them was ready
        assert code_of(new)[0] == running, end
        new.end(3)
        new = supervised.agent(ready=end == LOOP)
    assert code_of(new)[0] == ""
    assert status(new) == {
        "state": "rolled_back",
        "error": f"the code that had been promoted ended {LOOP} times in a row before it was ready"
        " (status 3); the log has why",
        "path": running,
        "running": "",
    }
    assert supervised.logged().count("upgrade rolled back") == 1


def test_promoted_code_that_is_ready_now_and_then_stays(supervised: Supervised) -> None:
    new = promote(supervised, "new")
    for end in range(LOOP + 2):
        new.end(3)
        new = supervised.agent(ready=end == 2)
    assert status(new)["state"] == "promoted"


def test_new_code_whose_program_cannot_be_started_is_rolled_back_in_time(supervised: Supervised) -> None:
    old = supervised.agent()
    begin(supervised, old, seconds=0.5)
    program = supervised.directory / "puppet"
    program.rename(program.with_name("away"))
    old.end(0)
    eventually(lambda: "rolled back" in supervised.logged(), "its time is up")
    program.with_name("away").rename(program)
    back = supervised.agent()
    assert code_of(back)[0] == ""
    assert status(back)["state"] == "rolled_back"


def test_one_upgrade_at_a_time(supervised: Supervised) -> None:
    old = supervised.agent()
    begin(supervised, old)
    with pytest.raises(Refused, match="an upgrade is under way"):
        begin(supervised, old, name="other")


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"path": "/etc", "seconds": 1},
        {"path": "{code}/../new", "seconds": 1},
        {"path": "{code}/missing", "seconds": 1},
        {"path": "{code}/new", "seconds": 0},
        {"path": "{code}/new", "seconds": 1e9},
        {"path": "{code}/new", "seconds": "1"},
        {"path": 7, "seconds": 1},
    ],
)
def test_code_that_is_elsewhere_or_no_agents_is_refused(
    supervised: Supervised, arguments: dict[str, Any]
) -> None:
    puppet = supervised.agent()
    code(supervised)
    path = arguments.get("path")
    if isinstance(path, str):
        arguments = {**arguments, "path": path.replace("{code}", str(supervised.state / "code"))}
    with pytest.raises(Refused):
        puppet.ask("upgrade", arguments)
    assert status(puppet)["state"] == "none"
    assert os.path.isdir(f"/proc/{puppet.pid}")
