"""CPUs and memory blocks in sysfs (admin-guide/cputopology.rst, memory-hotplug.rst)."""

from __future__ import annotations

import os

from gcsagent.agent import proc
from protocol.checks import cpu_list
from protocol.families.guest import CpuLists, MemoryBlocks

SYSTEM = "/sys/devices/system"


def cpus(system: str = SYSTEM) -> CpuLists:
    return CpuLists(*(proc.text(f"{system}/cpu/{name}") for name in ("possible", "present", "online")))


def memory(system: str = SYSTEM, meminfo: str = proc.MEMINFO) -> MemoryBlocks:
    states = memory_states(system)
    sizes = proc.meminfo(meminfo)
    return MemoryBlocks(
        sizes.get("MemTotal", 0),
        sizes.get("MemAvailable", 0),
        int(proc.text(f"{system}/memory/block_size_bytes") or "0", 16),
        ranges({number for number, state in states.items() if state == "online"}),
        ranges({number for number, state in states.items() if state != "online"}),
    )


def memory_states(system: str = SYSTEM) -> dict[int, str]:
    """By number of block: online, offline or going-offline."""
    try:
        names = os.listdir(f"{system}/memory")
    except OSError:
        return {}
    numbers = [int(name[6:]) for name in names if name.startswith("memory") and name[6:].isdigit()]
    return {number: proc.text(f"{system}/memory/memory{number}/state") for number in sorted(numbers)}


def numbers(text: str) -> set[int]:
    """Of one of the kernel's lists, which may be empty."""
    return cpu_list(text) if text else set()


def ranges(found: set[int]) -> str:
    """The kernel's way to write such a list."""
    parts: list[list[int]] = []
    for number in sorted(found):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
