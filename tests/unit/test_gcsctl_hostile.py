"""gcsctl on terminals, in locales and with guests that are not as one would wish."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from protocol.methods import METHODS
from protocol.schema import SchemaError, from_wire
from tests.fakes.fake_agent import FakeAgent
from tests.fuzz import vectors
from tests.gcsctl_process import gcsctl, with_agent

EVIL = "\x1b]0;evil\x07\nsecond line \u202e"

SHOWN = {
    "network.state": ("network", "show"),
    "network.attach": ("network", "attach", "web"),
    "storage.mount": ("storage", "mount", "--device", "/dev/vdb", "--target", "/data", "data"),
    "storage.list": ("storage", "ls"),
    "guest.snapshot_prepare": ("snapshot", "prepare", "nightly"),
    "guest.snapshot_resume": ("snapshot", "resume", "--no-machine", "nightly"),
    "container.list": ("ps",),
    "container.processes": ("ps", "web"),
    "checkpoint.list": ("checkpoint", "ls"),
    "agent.info": ("info",),
}


@pytest.mark.parametrize("method", SHOWN)
def test_no_terminal_obeys_a_guest(tmp_path: Path, method: str) -> None:
    hostile = spoilt(METHODS[method].result, vectors.named("results")[method][3])

    async def body(agent: FakeAgent) -> None:
        agent.handlers[method] = lambda params: hostile
        done = await gcsctl(agent, *SHOWN[method])
        assert "evil" in done.out
        assert all(char.isprintable() or char == "\n" for char in done.out)
        assert "\nsecond line" not in done.out

    with_agent(tmp_path, body)


def spoilt(kind: type, value: Any) -> Any:
    """A result with EVIL at the end of each text that the contract lets be anything."""
    places = list(texts(value))
    for place in places:
        *way, last = place
        holder = value
        for step in way:
            holder = holder[step]
        before = holder[last]
        holder[last] = before + EVIL
        try:
            from_wire(kind, value)
        except SchemaError:
            holder[last] = before
    return value


def texts(value: Any, *way: Any) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        if isinstance(item, str):
            yield (*way, key)
        yield from texts(item, *way, key)


def outcome(tmp_path: Path, line: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Of a shell's command line, in which "$0" is gcsctl."""
    script = tmp_path / "gcsctl"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m gcsagent.host "$@"\n')
    script.chmod(0o755)
    places = {"PYTHONPATH": os.getcwd(), "XDG_STATE_HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path)}
    return subprocess.run(
        ["sh", "-c", line, str(script)],
        env={**os.environ, **places, **environment},
        capture_output=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    "line, code",
    [
        ('"$0" vm snapshot ls >&-', 0),
        ('"$0" vm stop nobody 2>&-', 125),
        ('"$0" vm --frobnicate 2>&- >&- <&-', 125),
    ],
)
def test_without_standard_descriptors_the_exit_code_is_the_same(tmp_path: Path, line: str, code: int) -> None:
    done = outcome(tmp_path, line)
    assert (done.returncode, done.stdout) == (code, b"")
    assert b"Traceback" not in done.stderr


def test_a_locale_that_lacks_a_letter(tmp_path: Path) -> None:
    vm = tmp_path / "gcsctl" / "vms" / "web"
    vm.mkdir(parents=True)
    record: dict[str, Any] = dict.fromkeys(("keeper_pid", "keeper_started", "memory_mib", "cpus"), 1)
    record |= dict.fromkeys(("boot_id", "console", "qmp"), "x") | {"created": 0.0}
    (vm / "vm.json").write_text(json.dumps(record | {"name": "web", "state": "crashed", "reason": "café"}))
    (tmp_path / "bin").mkdir()
    done = outcome(tmp_path / "bin", '"$0" vm ls', PYTHONIOENCODING="ascii", XDG_STATE_HOME=str(tmp_path))
    assert done.stdout.split()[-1] == rb"caf\xe9"
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_user_without_a_home(tmp_path: Path) -> None:
    """As `docker run --user 12345` makes one."""
    tell = "import os, sys; os.geteuid = os.getuid = lambda: 54321; from gcsagent.host.gcsctl import main; "
    done = subprocess.run(
        [sys.executable, "-c", tell + "sys.exit(main(['vm', 'ls']))"],
        env={"PYTHONPATH": os.getcwd(), "PATH": os.defpath},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 125
    assert done.stderr.startswith("gcsctl: no home directory: set HOME")
    assert len(done.stderr.splitlines()) == 1
