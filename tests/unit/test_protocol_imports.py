"""What importing the contract brings into a process: nothing that could do I/O."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import protocol

ROOT = Path(__file__).parent.parent.parent
MODULES = [
    "protocol",
    *(module.name for module in pkgutil.walk_packages(protocol.__path__, prefix="protocol.")),
]

# asyncio and logging stand for themselves: each would cost the agent's start more than the whole contract.
DOES_IO = {
    *("socket", "_socket", "ssl", "select", "selectors", "asyncio", "subprocess", "_posixsubprocess"),
    *("threading", "multiprocessing", "concurrent", "signal", "fcntl", "mmap", "pty", "tty", "termios"),
    *("logging", "tempfile", "shutil", "pathlib", "glob", "urllib", "http", "ctypes", "random", "secrets"),
    *("json", "argparse", "tenacity", "pythonjsonlogger", "ptyprocess", "gcsagent"),
}
NEWLY_IMPORTED = """
import sys
sys.path.insert(0, sys.argv[1])
before = set(sys.modules)
__import__(sys.argv[2])
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""


def imported_by(module: str) -> set[str]:
    """Top-level modules a bare interpreter has after importing ``module`` and had not before."""
    paths = json.dumps([path for path in sys.path if path.endswith("-packages")])
    setup = f"import sys; sys.path += {paths}\n"
    command = [sys.executable, "-I", "-S", "-c", setup + NEWLY_IMPORTED, str(ROOT), module]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


@pytest.mark.parametrize("module", MODULES)
def test_importing_the_contract_pulls_in_no_io(module: str) -> None:
    found = imported_by(module)
    assert "protocol" in found
    assert not found & DOES_IO


def test_the_check_sees_what_it_looks_for() -> None:
    assert {"socket", "selectors", "logging", "asyncio"} <= imported_by("asyncio")


def test_msgpack_is_the_only_package_beside_the_standard_library() -> None:
    found = set().union(*map(imported_by, MODULES)) - set(sys.stdlib_module_names)
    # Cython names its run-time types after its own version, in a module of no file.
    assert {name for name in found if "cython" not in name} == {"protocol", "msgpack"}


def test_all_modules_are_looked_at() -> None:
    assert len(MODULES) == len(list((ROOT / "protocol").rglob("*.py")))
