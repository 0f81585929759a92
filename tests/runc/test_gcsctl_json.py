"""``--json`` of every command there is: it parses, and has the fields that JSON.md promises.

What this machine can do is done by the real agent. What needs a guest of its own (CRIU, hot-plugged hardware,
its network) is answered by a scripted agent with the results of protocol/vectors, or by a fake QEMU.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import re
import select
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from gcsagent.host.cli import parser
from tests.cases import image_files
from tests.cases.agents import REPO, RunningAgent
from tests.fakes.fake_agent import FakeAgent
from tests.fakes.vm import FakeHost, fake_host
from tests.unit.test_gcsctl_completion import leaves

SECONDS = 60.0
ROW = re.compile(r"^\| `([^`]+)` \| ([a-z ]+) \| (.+) \|$", re.M)
ESCAPE = "\x1b"


@dataclass(frozen=True, slots=True)
class Promise:
    form: str
    keys: frozenset[str]


def promises() -> dict[str, Promise]:
    text = (REPO / "gcsagent/host/cli/JSON.md").read_text()
    return {
        command: Promise(form, frozenset(re.findall(r"`([^`]+)`", keys)))
        for command, form, keys in ROW.findall(text)
    }


PROMISES = promises()

REAL = {
    "info": "info",
    "ping": "ping",
    "run": "run --rm {root} -- true",
    "create": "create -i --id made {root} -- cat",
    "start": "start made",
    "attach": "attach made",
    "wait": "wait made",
    "state": "state box",
    "exec": "exec box -- true",
    "ps": "ps",
    "logs": "logs box",
    "kill": "kill --signal CONT box",
    "pause": "pause box",
    "resume": "resume box",
    "stats": "stats box",
    "update": "update --pids 100 box",
    "cp": "cp box:/etc/hostname {tmp}/hostname",
    "pod update": "pod update --pids 100 pod",
    "pod stats": "pod stats pod",
    "stop": "stop made",
    "delete": "delete made",
    "events": "events",
    "forward": "forward 127.0.0.1:0:box:80",
    "clock": "clock",
    "entropy": "entropy",
    "resources": "resources",
    "network show": "network show --container box",
    "metrics": "metrics",
    "stacks": "stacks",
    "log-level": "log-level",
    "agent-logs": "agent-logs",
    "top": "top --interval 0.1",
    "storage mount": "storage mount data --tmpfs 1M",
    "storage ls": "storage ls",
    "storage unmount": "storage unmount data",
    "snapshot prepare": "snapshot prepare nightly",
    "snapshot resume": "snapshot resume --no-machine nightly",
    "completion": "completion bash",
    "upgrade": "upgrade {repo}",
    "shutdown": "shutdown --grace 1",
}
"""In this order, on one agent: `box` and `pod` run, and it ends with the last."""

SCRIPTED = {
    "checkpoint create": "checkpoint create web web-1",
    "checkpoint ls": "checkpoint ls",
    "checkpoint rm": "checkpoint rm web-1",
    "restore": "restore web-1",
    "network set": "network set eth0 --address 10.0.0.2/24",
    "network apply": "network apply {tmp}/net.json",
    "network attach": "network attach web",
    "network remove": "network remove eth0",
    "online": "online",
    "storage trim": "storage trim data",
    "storage freeze": "storage freeze data",
    "storage thaw": "storage thaw data",
}

FAKE_VM = {
    "vm start": "vm start dev --accel tcg --vsock vhost-user --append fake=boot",
    "vm ls": "vm ls",
    "vm replug": "vm replug dev --no-wait",
    "vm console": "vm console dev",
    "vm stop": "vm stop dev --timeout 0.1",
}

IMAGES = {
    "image load": "image load {tmp}/app.tar",
    "image ls": "image ls",
    "image inspect": "image inspect {tmp}/app.tar",
    "image rm": "image rm app:1",
}

ELSEWHERE = {
    "shell": "tests/runc/test_shell_gcsctl.py",
    "pressure": "tests/cases",  # a document when the kernel tells of pressure
    "vm run": "tests/vm/test_network.py",
    "vm grow": "tests/vm",
    **{f"vm {kind} {verb}": "tests/vm" for kind in ("disk", "net", "share") for verb in ("add", "rm", "ls")},
    **{f"vm snapshot {verb}": "tests/vm/test_snapshot.py" for verb in ("create", "ls", "rm")},
}
"""What runs it; tests/vm/test_gcsctl_vm.py compares the fields of `vm grow`, `disk`, `net` and `share`."""


@pytest.fixture(scope="module")
def box(rootfs: str) -> Iterator[tuple[RunningAgent, str]]:
    agent = RunningAgent()
    root = f"--overlay --rootfs {rootfs}"
    try:
        for line in (
            f"run -d --id box {root} -- sh -c 'echo hello; exec sleep 1000'",
            f"run -d --sandbox --id pod {root} -- sleep 1000",
        ):
            assert gcsctl(agent.address, line).returncode == 0
        yield agent, root
        assert agent.wait() == 0  # the walk's last command ended it
    finally:
        agent.destroy()


def gcsctl(address: str, line: str, *options: str, **env: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "gcsagent.host", *options, *shlex.split(line)]
    return subprocess.run(
        argv,
        cwd=REPO,
        env={**os.environ, "GCS_ADDRESS": address, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def kept(command: str, out: str, err: str) -> list[str]:
    """In what the command's JSON differs from its promise."""
    promise = PROMISES[command]
    text = err if promise.form == "line on stderr" else out
    try:
        documents = (
            [json.loads(line) for line in text.splitlines()] if "line" in promise.form else [json.loads(text)]
        )
    except ValueError as error:
        return [f"{command}: {error}: {text!r} {err!r}"]
    if promise.form == "array":
        assert isinstance(documents[0], list), command
        documents = documents[0]
    if not documents:
        return [f"{command}: nothing came"]
    return [
        f"{command}: {sorted(found)} and not {sorted(promise.keys)}"
        for found in {frozenset(document) for document in documents}
        if found != promise.keys
    ]


def test_every_command_is_walked_and_promised() -> None:
    commands = {path for path, _ in leaves(parser.build())}
    walked = [*REAL, *SCRIPTED, *FAKE_VM, *IMAGES, *ELSEWHERE]
    assert len(walked) == len(set(walked))
    assert commands == set(walked) == set(PROMISES)


def test_every_command_takes_json_and_has_an_example() -> None:
    for path, leaf in leaves(parser.build()):
        assert "--json" in leaf._option_string_actions, path
        example = (leaf.epilog or "").partition("example: ")[2]
        assert "gcsctl" in example, path
        assert path.split()[-1] in example, path
        assert leaf.description, path


@pytest.mark.timeout(240)
def test_the_real_agents(box: tuple[RunningAgent, str], tmp_path: Path) -> None:
    agent, root = box
    wrong = []
    for command, line in REAL.items():
        line = line.format(root=root, tmp=tmp_path, repo=REPO)
        if command == "forward":
            done = forwarded(agent.address, line)
        else:
            # A terminal's promises must not get into a pipe, whatever it is said to be.
            done = gcsctl(agent.address, line, "--json", TERM="xterm-256color", CLICOLOR_FORCE="1")
        if done.returncode:
            wrong.append(f"{command}: {done.returncode} {done.stderr}")
        else:
            wrong += kept(command, done.stdout, done.stderr)
        assert ESCAPE not in done.stdout + done.stderr, command
    assert wrong == []


def forwarded(address: str, line: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "gcsagent.host", *line.split(), "--json"]
    env = {**os.environ, "GCS_ADDRESS": address}
    with subprocess.Popen(argv, cwd=REPO, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], SECONDS)[0]
        said = process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        return subprocess.CompletedProcess(argv, process.wait(SECONDS), said, "")


def test_those_of_a_guest(tmp_path: Path) -> None:
    (tmp_path / "net.json").write_text("{}")
    wrong: list[str] = []

    async def scenario() -> None:
        async with FakeAgent(tmp_path / "gcs.sock") as agent:
            for case in json.loads((REPO / "protocol/vectors/results.json").read_text()):
                result = case["message"]["response"]["result"]
                method = case["name"].partition(" ")[0]
                if method not in agent.handlers and isinstance(result, dict):
                    agent.handlers[method] = functools.partial(_constant, result)
            for command, line in SCRIPTED.items():
                done = await asyncio.to_thread(gcsctl, agent.address, line.format(tmp=tmp_path), "--json")
                wrong.extend([done.stderr] if done.returncode else kept(command, done.stdout, done.stderr))

    asyncio.run(scenario())
    assert wrong == []


def test_those_of_images(tmp_path: Path) -> None:
    image_files.docker_archive(tmp_path / "app.tar", image_files.tar(image_files.file("hello")))
    wrong = []
    for command, line in IMAGES.items():
        done = gcsctl("", line.format(tmp=tmp_path), "--json", GCS_CACHE=str(tmp_path / "cache"))
        wrong += [done.stderr] if done.returncode else kept(command, done.stdout, done.stderr)
    assert wrong == []


def _constant(result: dict[str, object], _params: object) -> dict[str, object]:
    return result


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHost]:
    yield from fake_host(monkeypatch)


def test_those_of_vms(host: FakeHost) -> None:
    wrong = []
    for command, line in FAKE_VM.items():
        done = gcsctl("", line, "--json")
        wrong += [done.stderr] if done.returncode else kept(command, done.stdout, done.stderr)
    assert wrong == []
