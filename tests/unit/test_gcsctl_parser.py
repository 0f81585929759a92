"""Only the commands at hand are declared: each as it is among all the others."""

from __future__ import annotations

import argparse
import subprocess
import sys

import pytest

from gcsagent.host.cli import parser


def commands(tree: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    action = next(action for action in tree._actions if isinstance(action, argparse._SubParsersAction))
    return dict(action.choices)


def helps(tree: argparse.ArgumentParser) -> str:
    """Of the command and all below it."""
    below = [action for action in tree._actions if isinstance(action, argparse._SubParsersAction)]
    return tree.format_help() + "".join(helps(each) for action in below for each in action.choices.values())


@pytest.mark.parametrize("name", commands(parser.build()))
def test_a_command_alone_is_what_it_is_among_all(name: str) -> None:
    alone = commands(parser.build(name))
    assert name in alone
    assert len(alone) < len(commands(parser.build()))
    assert helps(alone[name]) == helps(commands(parser.build())[name])


@pytest.mark.parametrize(
    "words",
    [
        ["state", "web"],
        ["--vm", "pod", "state", "web"],
        ["--json", "--wait=3", "--address", "unix:/x", "state", "web"],
    ],
)
def test_the_command_is_found_behind_gcsctls_own_options(words: list[str]) -> None:
    assert parser.parse(words).id == "web"


@pytest.mark.parametrize("words", [[], ["--vm"], ["--vm", "dev"], ["nonesuch"], ["sta", "web"]])
def test_without_a_command_all_are_named(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parser.parse(words)
    assert caught.value.code == parser.EXIT_GCSCTL
    assert capsys.readouterr().err.startswith("gcsctl: ")


def test_a_small_command_imports_no_launcher() -> None:
    script = "import sys; from gcsagent.host.cli import parser; parser.parse(['ps']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "gcsagent.host.cli.container_commands" in loaded
    assert not {name for name in loaded if name.startswith(("gcsagent.host.vm.", "gcsagent.host.image"))}
