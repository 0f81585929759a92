"""What the declarations of commands are made of, besides argparse."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

Add = Callable[..., argparse.ArgumentParser]
"""parser._add: the parser of a command, by its name, handler, meaning and an example."""


def add_group(commands: Any, name: str, about: str, example: str) -> Any:
    """A word that stands before commands of its own; what is returned is for ``add``."""
    group = commands.add_parser(name, help=about, description=about, epilog=f"example: {example}")
    return group.add_subparsers(metavar="COMMAND", required=True)


def add_vm_name(parser: argparse.ArgumentParser) -> None:
    """The VM that a command is about."""
    parser.add_argument("name", metavar="NAME")
