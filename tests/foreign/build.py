"""Compiles the client in C (client.c) with the sanitizers, warnings being errors."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SECONDS = 60.0
_FLAGS = ["-std=c11", "-D_GNU_SOURCE", "-g", "-O1", "-Wall", "-Wextra", "-Wconversion", "-Werror"]
_SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
_MSGPACK = ("msgpackc", "msgpack-c")
"""The library before and since 6.0: Debian 12's and 13's."""


def build(directory: Path) -> Path:
    """The client's program, in ``directory``."""
    program = directory / "foreign-client"
    argv = ["gcc", *_FLAGS, *_SANITIZERS, *sorted(map(str, HERE.glob("*.c"))), "-o", str(program)]
    argv += ["-ljson-c", f"-l{next(filter(_installed, _MSGPACK), _MSGPACK[0])}"]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=SECONDS)
    except FileNotFoundError:
        pytest.fail("there is no gcc: run scripts/install-deps.sh as root first", pytrace=False)
    assert done.returncode == 0, done.stderr
    return program


def _installed(library: str) -> bool:
    name = f"-print-file-name=lib{library}.so"
    found = subprocess.run(["gcc", name], capture_output=True, text=True, timeout=SECONDS, check=True).stdout
    return found.startswith("/")


def run(program: Path, *args: object, seconds: float = SECONDS) -> tuple[int, list[str], str]:
    """Its status, what it said line by line, and its complaint."""
    argv = [str(program), *map(str, args)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=seconds)
    return done.returncode, done.stdout.splitlines(), done.stderr


def ran_a_container(program: Path, address: object, rootfs: str, seconds: float = SECONDS) -> None:
    """It has run one over ``address``, and met errors, as the page says."""
    said = ["exit_code 7 stdout 240000", "errors seen", "breach seen"]
    assert run(program, "run", address, rootfs, seconds=seconds) == (0, said, "")
