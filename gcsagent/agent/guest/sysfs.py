"""CPUs and memory blocks in sysfs (admin-guide/cputopology.rst, memory-hotplug.rst)."""

from __future__ import annotations

import os

from protocol.checks import cpu_list
from protocol.families.guest import CpuLists, MemoryBlocks

SYSTEM = "/sys/devices/system"
MEMINFO = "/proc/meminfo"


def cpus(system: str = SYSTEM) -> CpuLists:
    return CpuLists(*(_read(f"{system}/cpu/{name}") for name in ("possible", "present", "online")))


def memory(system: str = SYSTEM, meminfo: str = MEMINFO) -> MemoryBlocks:
    states = memory_states(system)
    sizes = dict(line.split(":", 1) for line in _read(meminfo).splitlines() if ":" in line)
    return MemoryBlocks(
        _kib(sizes, "MemTotal"),
        _kib(sizes, "MemAvailable"),
        int(_read(f"{system}/memory/block_size_bytes") or "0", 16),
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
    return {number: _read(f"{system}/memory/memory{number}/state") for number in sorted(numbers)}


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


def _kib(sizes: dict[str, str], name: str) -> int:
    return int(sizes.get(name, "0").split()[0])


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""
