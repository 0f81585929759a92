"""PID 1's import budget: what it never loads, and that its module says the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gcsagent.supervisor

NEVER = ("asyncio", "logging", "dataclasses", "subprocess", "threading", "argparse", "ctypes", "typing")

AS_A_GUEST = """
import json, sys, types
from gcsagent import __main__
from gcsagent.common import config
from gcsagent.supervisor import main, machine, standing
from protocol.dataclass import replace

# The way of --guest up to where the agent would be started, on a machine that must not change.
settings = replace(config.parse_guest_settings(["gcs.port=1024"]), state=sys.argv[1])
standing.raise_limits = standing.protect_from_oom = lambda: None
machine.PowerButton = lambda loop, pressed: None
main.Supervisor.run = lambda self: 0
assert __main__._run(settings) == 0
sys.stdout.write(json.dumps(sorted(sys.modules)))
"""


def modules_of(code: str, *arguments: str) -> set[str]:
    """-S: what a site's .pth files import is not ours; the libraries' place is given instead."""
    import msgpack

    result = subprocess.run(
        [sys.executable, "-S", "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={
            "PYTHONPATH": ":".join([str(Path(__file__).parents[2]), str(Path(msgpack.__file__).parents[1])])
        },
    )
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout))


def test_a_guests_supervisor_loads_none_of_what_it_must_not(tmp_path: Path) -> None:
    loaded = modules_of(AS_A_GUEST, str(tmp_path))
    assert "gcsagent.supervisor.main" in loaded
    assert "gcsagent.supervisor.machine" in loaded
    assert loaded.isdisjoint(NEVER), sorted(loaded & set(NEVER))
    assert not [name for name in loaded if name.startswith(("gcsagent.agent", "gcsagent.host"))]


def test_its_docstring_states_the_same_budget() -> None:
    text = gcsagent.supervisor.__doc__ or ""
    assert all(name in text for name in NEVER)
