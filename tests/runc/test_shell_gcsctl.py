"""``gcsctl shell`` at a real terminal and without one, against a real guest's side."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cases.agents import REPO
from tests.cases.shells import Shelled, command_of, stopped
from tests.runc.test_gcsctl_json import PROMISES
from tests.runc.test_gcsctl_real import Terminal, resized_and_interrupted

SECONDS = 60.0
Done = subprocess.CompletedProcess[str]


def environment(shelled: Shelled, **more: str) -> dict[str, str]:
    env = {**os.environ, "GCS_ADDRESS": shelled.agent.address, **more}
    return {"GCS_SHELL_ADDRESS": str(shelled.address), **env}


def gcsctl(shelled: Shelled, *words: str, data: str = "", **env: str) -> Done:
    return subprocess.run(
        [sys.executable, "-m", "gcsagent.host", *words],
        cwd=REPO,
        env=environment(shelled, **env),
        input=data,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


@pytest.mark.parametrize(
    "words, code, out, err",
    [
        (("box", "--", "sh", "-c", "hostname; exit 42"), 42, "box\n", ""),
        (("--", "sh", "-c", "echo $A; kill -9 $$"), 137, "b\n", ""),
        (("box", "--", "nonesuch"), 127, "", "gcsctl: there is no nonesuch in container box"),
        (("box", "--", "/etc/passwd"), 126, "", "gcsctl: /etc/passwd cannot be executed in container box"),
        (("nobody",), 125, "", "gcsctl: there is no container nobody"),
        (("b/x",), 125, "", "gcsctl: b/x: an id must be letters"),
        (("box", "ls"), 125, "", "gcsctl: ls: options go before the container, and a command behind --"),
        (
            ("--timeout", "0.2", "box", "--", "sleep", "9"),
            129,
            "",
            "gcsctl: the shell was ended: its time limit",
        ),
        (("--kill", "nobody"), 125, "", "gcsctl: there is no shell nobody"),
        (("--shell-address", "unix:/nowhere/x"), 125, "", "gcsctl: the debug shell is not allowed there"),
        (("--shell-address", "tcp:1"), 125, "", "gcsctl: argument --shell-address: 'tcp:1': 'tcp:1'"),
    ],
)
def test_exit_codes_and_one_line_of_what_is_wrong(
    shelled: Shelled, words: tuple[str, ...], code: int, out: str, err: str
) -> None:
    done = gcsctl(shelled, "shell", *(("-e", "A=b") if words[0] == "--" else ()), *words)
    assert (done.returncode, done.stdout) == (code, out), done
    assert done.stderr.startswith(err)
    assert done.stderr.count("\n") == bool(err)


def test_outside_a_guest_it_wants_the_shells_own_address(shelled: Shelled) -> None:
    done = gcsctl(shelled, "shell", GCS_SHELL_ADDRESS="")
    assert done.returncode == 125
    assert (
        "has another address, the one `gcsagent --shell` was given; give it with --shell-address"
        in done.stderr
    )
    done = gcsctl(shelled, "shell", "--shell-address", shelled.agent.address)
    assert "is an agent; the debug shell has an address of its own" in done.stderr


@pytest.mark.parametrize("where", [(), ("box",)])
def test_a_script_from_a_pipe_ends_with_its_status(shelled: Shelled, where: tuple[str, ...]) -> None:
    """As with `ssh host sh`: no terminal, no prompt, no echo, and its end is the end."""
    script = 'tty; echo one; echo two >&2\nread line\nto be read\necho "[$line]"; exit 7\necho never\n'
    done = gcsctl(shelled, "shell", *where, data=script)
    assert (done.returncode, done.stdout) == (7, "not a tty\none\ntwo\n[to be read]\n"), done


@pytest.mark.parametrize("words", [(), ("box",), ("--", "cat"), ("box", "--", "cat")])
def test_without_input_it_ends(shelled: Shelled, words: tuple[str, ...]) -> None:
    done = gcsctl(shelled, "shell", *words)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_goes_through_a_pipe_is_whole(shelled: Shelled) -> None:
    lines = "".join(f"{number}\n" for number in range(100_000)) + "\x04\x03 and no newline"
    done = gcsctl(shelled, "shell", "box", "--", "sh", "-c", "sleep 0.1; cat", data=lines)
    assert (done.returncode, done.stdout) == (0, lines)


def test_a_command_that_does_not_read_its_input_is_not_waited_for(shelled: Shelled) -> None:
    words = [sys.executable, "-m", "gcsagent.host", "shell", "box", "--", "sh", "-c", "exit 3"]
    with subprocess.Popen(["yes"], stdout=subprocess.PIPE) as source:
        done = subprocess.run(
            words, cwd=REPO, env=environment(shelled), stdin=source.stdout, timeout=SECONDS, check=False
        )
        source.kill()
    assert done.returncode == 3


def test_what_json_promises(shelled: Shelled, tty: Any) -> None:
    done = gcsctl(shelled, "--json", "shell", "--", "true")
    assert set(json.loads(done.stderr)) == PROMISES["shell"].keys
    terminal = tty("shell", "box", "--", "sh", "-c", "echo re''ady; exec sleep 100000")
    terminal.expect(b"ready\r\n")
    [listed] = json.loads(gcsctl(shelled, "shell", "--list", "--json").stdout)
    assert (listed["container"], listed["argv"][0], listed["client"]) == ("box", "sh", "gcsctl")
    table = gcsctl(shelled, "shell", "--list").stdout.splitlines()
    assert table[0].split() == ["SHELL", "CONTAINER", "PID", "RUNNING", "PEER", "COMMAND"]
    assert table[1].split()[:3] == [listed["shell"], "box", str(listed["pid"])]
    done = gcsctl(shelled, "shell", "--json", "--kill", listed["shell"])
    assert json.loads(done.stdout) == {"shell": listed["shell"]}
    terminal.expect(b"gcsctl: the shell was ended: somebody has ended it (shell.kill)")
    assert terminal.end() == 129
    assert gcsctl(shelled, "shell", "--list").stdout.split() == table[0].split()


@pytest.fixture
def tty(shelled: Shelled) -> Iterator[Any]:
    terminals: list[Terminal] = []

    def start(*words: str, rows: int = 24, cols: int = 80) -> Terminal:
        argv = [sys.executable, "-m", "gcsagent.host", *words]
        terminals.append(Terminal(argv, environment(shelled, TERM="dumb"), rows, cols))
        return terminals[-1]

    yield start
    for each in terminals:
        each.close()


def test_a_terminal_is_raw_resizes_and_is_restored_while_the_agent_is_stopped(
    shelled: Shelled, tty: Any
) -> None:
    with stopped(shelled.agent):
        terminal = tty("shell", "box", rows=31, cols=101)
        terminal.type(b"stty size; echo $TERM $((6*7))\n")
        terminal.expect(b"31 101\r\ndumb 42\r\n")
        resized_and_interrupted(terminal)
        terminal.expect(b"# ")
        terminal.type(b"exit 21\n")
        assert terminal.end() == 21


def test_a_killed_gcsctl_leaves_no_shell(shelled: Shelled, tty: Any) -> None:
    terminal = tty("shell", "box", "--", "sh", "-c", "echo re''ady; exec sleep 100000")
    terminal.expect(b"ready\r\n")
    [listed] = json.loads(gcsctl(shelled, "shell", "--list", "--json").stdout)
    terminal.process.kill()
    terminal.process.wait()
    pidfd = os.pidfd_open(listed["pid"]) if command_of(listed["pid"]) else -1
    if pidfd >= 0:
        assert select.select([pidfd], [], [], SECONDS)[0]
        os.close(pidfd)
    assert gcsctl(shelled, "shell", "--list", "--json").stdout == "[]\n"
