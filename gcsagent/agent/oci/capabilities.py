"""``ALL`` among a process's capabilities: whatever this guest can give, which only the agent knows.

A kernel may know more or fewer than whoever wrote the spec, and the agent itself may run without some.
"""

from __future__ import annotations

from gcsagent.agent.oci.look import Json
from gcsagent.agent.oci.names import ALL, CAPABILITIES, CAPABILITY_SETS


def expand_all(process: Json) -> None:
    """Puts the names for ``ALL`` into each set that has it."""
    sets = process.get("capabilities") or {}
    for kind in CAPABILITY_SETS:
        if ALL in (sets.get(kind) or ()):
            sets[kind] = available()


def available(status: str = "/proc/self/status") -> list[str]:
    """Those in the agent's own bounding set (proc(5)): what it starts can have no others."""
    with open(status, encoding="ascii", errors="replace") as file:
        mask = next(int(line.split()[1], 16) for line in file if line.startswith("CapBnd:"))
    return [name for number, name in enumerate(CAPABILITIES) if mask >> number & 1]
