"""Completion: what is offered where, and that bash, zsh and fish themselves come to it on Tab."""

from __future__ import annotations

import argparse
import asyncio
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gcsagent.host.cli import completion, parser, shells
from gcsagent.host.cli.completion import complete, kind_of
from protocol.types import ContainerState, Status
from tests.fakes.fake_agent import FakeAgent
from tests.gcsctl_process import with_agent

SECONDS = 20.0


def offered(*words: str) -> list[str]:
    return [value for value, _ in complete(parser.build(), list(words)).values]


@pytest.mark.parametrize(
    "words, some",
    [
        (["st"], ["start", "state", "stop", "stats", "stacks", "storage"]),
        (["--address", "unix:/x", "vm", "st"], ["start", "stop"]),
        (["--address=unix:/x", "vm", "disk", "a"], ["add"]),
        (["run", "--network", ""], ["none", "host", "bridge"]),
        (["run", "--network=b"], ["--network=bridge"]),
        (["run", "-it", "--rm", "--netw"], ["--network"]),
        (["kill", "--signal", "KI"], ["KILL"]),
        (["log-level", "w"], ["warning"]),
        (["clock", "--set", ""], ["step", "slew"]),
        (["completion", ""], ["bash", "zsh", "fish"]),
        (["vm", "nonsense", ""], []),
        (["run", "--rootfs", "/x", "--", "--netw"], []),
        (["ps", "web", ""], []),
    ],
)
def test_what_is_offered(words: list[str], some: list[str]) -> None:
    assert offered(*words) == some


@pytest.mark.parametrize("words", [["run", "--rootfs", ""], ["upgrade", ""], ["exec", "c", "--", ""]])
def test_where_paths_stand(words: list[str]) -> None:
    assert complete(parser.build(), words).files


def leaves(tree: argparse.ArgumentParser, path: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in tree._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                yield from leaves(child, f"{path} {name}".strip())
            return
    yield path, tree


def test_every_option_and_command_is_offered_at_its_place() -> None:
    tree = parser.build()
    for path, leaf in leaves(tree):
        words = path.split()
        for depth in range(len(words)):
            assert words[depth] in offered(*words[:depth], "")
        names = {name for action in leaf._actions for name in action.option_strings if name[:2] == "--"}
        assert set(offered(*words, "-")) == names


def test_whatever_is_called_an_id_has_a_source() -> None:
    """Those that have none name what does not exist yet."""
    without = {
        f"{path} {action.dest}"
        for path, leaf in leaves(parser.build())
        for action in leaf._actions
        if action.metavar in ("ID", "NAME", "P", "PROCESS") and not kind_of(path, action)
    }
    new = ("run", "create", "restore", "storage mount", "vm start", "checkpoint create")
    other = {"network set interface", "network remove interface"}
    assert {each for each in without if not each.startswith(new)} == other


def test_what_only_the_agent_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(agent: FakeAgent) -> None:
        states = [
            ContainerState(name, Status.RUNNING, 7, "/b", 1, pod="pod" if name == "web" else "")
            for name in ("web", "db", "evil\x1b[31m")
        ]
        agent.handlers["container.list"] = lambda params: {"containers": states}
        ask = asyncio.to_thread
        assert await ask(offered, "--address", agent.address, "state", "") == ["web", "db"]
        assert await ask(offered, f"--address={agent.address}", "logs", "-f", "w") == ["web"]
        monkeypatch.setenv("GCS_ADDRESS", agent.address)
        assert await ask(offered, "cp", "d") == ["db:"]
        assert await ask(offered, "run", "--pod", "") == ["pod"]
        del agent.handlers["container.list"]
        assert await ask(offered, "state", "") == []

        async def silent(params: object) -> object:
            return await asyncio.Event().wait()

        agent.handlers["container.list"] = silent
        monkeypatch.setattr(completion, "DEADLINE_SECONDS", 0.2)
        assert await ask(offered, "state", "") == []

    with_agent(tmp_path, body)


def test_nobody_there_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("GCS_ADDRESS", raising=False)
    assert offered("--address", "unix:/no/such", "state", "") == []
    assert offered("--address", "nonsense", "state", "") == []
    assert offered("state", "") == []
    assert offered("--vm", "") == []


@pytest.mark.parametrize(
    "line, lines",
    [
        ("gcsctl log-level ", ["debug", "info", "warning", "error"]),
        ("gcsctl log-level 'w", ["warning"]),
        ('gcsctl run --network="b', ["bridge"]),
        ("gcsctl run --rootfs ./r", [":files"]),
    ],
)
def test_bash_gets_what_it_replaces(line: str, lines: list[str]) -> None:
    """It takes a word apart at ``=`` and ``:`` and replaces only what is behind the last."""
    assert shells.answer("bash", [line]) == lines


# -- the shells themselves ------------------------------------------------------------------------


@pytest.fixture
def shell_env(tmp_path: Path) -> dict[str, str]:
    """With a ``gcsctl`` in the PATH, and none of the machine's own set-up."""
    (tmp_path / "bin").mkdir()
    shim = tmp_path / "bin" / "gcsctl"
    paths = os.pathsep.join(path for path in sys.path if path)
    shim.write_text(f'#!/bin/sh\nPYTHONPATH={paths} exec {sys.executable} -m gcsagent.host "$@"\n')
    shim.chmod(0o755)
    kept = {key: value for key, value in os.environ.items() if not key.startswith("GCS_")}
    path = f"{tmp_path}/bin:/usr/bin:/bin"
    return {**kept, "PATH": path, "HOME": str(tmp_path), "ZDOTDIR": str(tmp_path), "TERM": "xterm"}


class Typing:
    """An interactive shell on a terminal."""

    def __init__(self, argv: list[str], env: dict[str, str], cwd: Path) -> None:
        self.main, side = pty.openpty()
        self.process = subprocess.Popen(
            argv, env=env, cwd=cwd, start_new_session=True, stdin=side, stdout=side, stderr=side
        )
        os.close(side)
        self.seen = b""

    def type(self, text: bytes, expected: bytes) -> None:
        """Types ``text`` and waits until ``expected`` has been shown since."""
        self.seen = b""
        os.write(self.main, text)
        deadline = time.monotonic() + SECONDS
        while expected not in self.seen:
            left = deadline - time.monotonic()
            assert select.select([self.main], [], [], max(0, left))[0], self.seen
            self.seen += os.read(self.main, 65536)

    def close(self) -> None:
        os.close(self.main)
        self.process.kill()
        self.process.wait()


@pytest.mark.parametrize(
    "argv, script",
    [
        (["bash", "--norc", "--noprofile", "-i"], b"source <(gcsctl completion bash)"),
        (["zsh", "-f", "-i"], b"autoload -Uz compinit; compinit -u -D; source <(gcsctl completion zsh)"),
    ],
    ids=["bash", "zsh"],
)
def test_tab_in_an_interactive_shell(
    shell_env: dict[str, str], tmp_path: Path, argv: list[str], script: bytes
) -> None:
    (tmp_path / "some-rootfs").mkdir()
    shell = Typing(argv, shell_env, tmp_path)
    try:
        shell.type(script + b"; echo lo''aded\n", b"loaded")
        shell.type(b"gcsctl log-level war\t", b"warning")
        shell.type(b"\x15gcsctl run --network=bri\t", b"bridge")
        shell.type(b"\x15gcsctl --address unix:/no checkpoint cr\t", b"create")
        shell.type(b"\x15gcsctl run --rootfs some\t", b"some-rootfs")
        shell.type(b"\x15gcsctl run --net\t", b"--network")
    finally:
        shell.close()


def test_fish_completes(shell_env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "some-rootfs").mkdir()

    def completions(line: str) -> list[str]:
        command = ["fish", "--no-config", "-c", f"gcsctl completion fish | source; complete -C '{line}'"]
        done = subprocess.run(
            command, env=shell_env, cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS, check=True
        )
        return [each.partition("\t")[0] for each in done.stdout.splitlines()]

    assert completions("gcsctl log-level ") == ["debug", "error", "info", "warning"]
    assert completions("gcsctl --address unix:/no vm st") == ["start", "stop"]
    assert completions("gcsctl run --rootfs some") == ["some-rootfs/"]
    assert completions("gcsctl run --netw") == ["--network"]
