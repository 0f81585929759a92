"""README's table of what the ancestors could do names only what exists here."""

from __future__ import annotations

import argparse
import enum
import re
from dataclasses import fields
from pathlib import Path

import pytest

import protocol.types
from gcsagent import options
from gcsagent.common import config
from gcsagent.host.cli.parser import build
from protocol import checks
from protocol.errors import Code
from protocol.method import Envelope
from protocol.methods import METHODS, families

ROOT = Path(__file__).parent.parent.parent
SPEC = (ROOT / "protocol" / "SPEC.md").read_text()
HEADING = "## What the ancestors could do, and where it is here"
ANCESTORS = 5


def rows() -> list[tuple[str, str]]:
    section = (ROOT / "README.md").read_text().split(HEADING)[1].split("\n## ")[0]
    lines = [line.strip("| ") for line in section.splitlines() if line.startswith("| ")]
    return [(left, right) for left, right in (line.split(" | ") for line in lines) if right != "here"]


def words_of_the_contract() -> set[str]:
    """Error codes, enumerations' values, the keys of every request, and details and events from SPEC.md."""
    found = {str(code.value) for code in Code} | {field.name for field in fields(Envelope)}
    for module in (protocol.types, *families()):
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, enum.Enum):
                found |= {str(member.value) for member in value}
    details = SPEC.split("`details` is a map;")[1].split("\n\nA wrong argument")[0]
    events = SPEC.split("## Events")[1].split("More will be added")[0]
    names = re.findall(r"^\| (`[^|]*`) \|", details + events, re.MULTILINE)
    return found | {name for cell in names for name in re.findall(r"`([\w.]+)`", cell)} | {checks.INIT}


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def problem_with(words: str) -> str | None:
    """Why something between backticks is nothing of ours; None if it is."""
    method, _, keys = words.partition(" ")
    if words.startswith("gcsctl "):
        return _command_problem(words.split()[1:])
    if words.startswith("gcsagent "):
        return None if words.split()[1] in agent_options() else "no such option"
    if words.startswith("gcs."):
        return None if f"    {words}=" in str(config.__doc__) else "no such setting"
    if method in METHODS:
        return _key_problem(method, re.findall(r"\w+", keys))
    return (
        None
        if words in words_of_the_contract()
        else "neither method, option, setting nor word of the contract"
    )


def _key_problem(method: str, keys: list[str]) -> str | None:
    known = {
        field.name for kind in (METHODS[method].params, METHODS[method].result) for field in fields(kind)
    }
    missing = set(keys) - known
    return f"{method} has no {', '.join(missing)}" if missing else None


def _command_problem(words: list[str]) -> str | None:
    parser = subcommands(build()).get(words[0])
    if parser is None:
        return "no such command"
    options = {option for action in parser._actions for option in action.option_strings}
    for word in words[1:]:
        wanted = [word] if word.startswith("--") else [f"-{letter}" for letter in word[1:]]
        if not set(wanted) <= options:
            return f"{words[0]} has no {word}"
    return None


def agent_options() -> set[str]:
    return set(re.findall(r"--[a-z-]+", Path(str(options.__file__)).read_text()))


def test_five_ancestors_and_what_they_could_do() -> None:
    section = (ROOT / "README.md").read_text().split(HEADING)[1].split("\n## ")[0]
    assert section.count("| here |") == ANCESTORS
    assert len(rows()) >= 55


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0][:40])
def test_everything_a_row_names_exists(row: tuple[str, str]) -> None:
    problems = {words: problem_with(words) for words in re.findall(r"`([^`]+)`", row[1])}
    assert {words: problem for words, problem in problems.items() if problem} == {}
    for text, path in re.findall(r"\[([^]]+)\]\(([^)]+)\)", row[1]):
        assert (ROOT / path).is_file(), path
        assert path.endswith(text)


@pytest.mark.parametrize(
    "words",
    [
        "container.explode",
        "container.kill {everything}",
        "gcsctl explode",
        "gcsctl exec --explode",
        "gcsctl exec -xit",
        "gcsagent --explode",
        "gcs.explode",
        "explode",
    ],
)
def test_what_does_not_exist_is_found_out(words: str) -> None:
    assert problem_with(words)
