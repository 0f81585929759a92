"""The commands about what a container uses and may use."""

from __future__ import annotations

import argparse
import re

from gcsagent.host.cli.common import UsageError, connect, print_json, print_table
from protocol.usage import ContainerStats, Pressure

_SIZE = re.compile(r"([0-9]{1,15})([KMGkmg]?)\Z", re.ASCII)


async def stats(args: argparse.Namespace) -> int:
    async with await connect(args) as client:
        found = await client.container_stats(args.id)
    if args.json:
        print_json(found)
    else:
        print_table(("WHAT", "NOW", "LIMIT", "PEAK", "PRESSURE"), _rows(found))
    return 0


async def update(args: argparse.Namespace) -> int:
    wanted = {"memory_bytes": args.memory, "cpus": args.cpus, "pids": args.pids}
    if all(value is None for value in wanted.values()):
        raise UsageError("nothing to update: give --memory, --cpus or --pids")
    async with await connect(args) as client:
        await client.update_container(args.id, memory_bytes=args.memory, cpus=args.cpus, pids=args.pids)
    if args.json:
        print_json({"container": args.id, **{name: value for name, value in wanted.items() if value}})
    return 0


def parse_size(text: str) -> int:
    """Bytes from ``64M``, ``1G``, ``512k`` (of 1024) or a plain number. Raises ValueError."""
    match = _SIZE.match(text)
    if match is None:
        raise ValueError("give a number of bytes, or one with K, M or G, like 64M")
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2].upper()]


def _rows(found: ContainerStats) -> list[tuple[str, ...]]:
    memory, cpu, pids, io = found.memory, found.cpu, found.pids, found.io
    throttled = f"throttled {_seconds(cpu.throttled_us)}" if cpu.throttled_us else ""
    return [
        (
            "memory",
            size(memory.current),
            size(memory.limit),
            size(memory.peak),
            _pressure(found.memory_pressure),
        ),
        ("cpu", _seconds(cpu.usage_us), throttled, "", _pressure(found.cpu_pressure)),
        ("pids", _count(pids.current), _count(pids.limit), "", ""),
        ("read", size(io.read_bytes), "", "", _pressure(found.io_pressure)),
        ("written", size(io.write_bytes), "", "", ""),
    ]


def size(count: int | None) -> str:
    if count is None:
        return ""
    for shift, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 1 << shift:
            return f"{count / (1 << shift):.1f} {unit}"
    return f"{count} B"


def _seconds(micros: int | None) -> str:
    return "" if micros is None else f"{micros / 1e6:.3f} s"


def _count(count: int | None) -> str:
    return "" if count is None else str(count)


def _pressure(found: Pressure | None) -> str:
    """Percent of the last ten seconds in which something waited."""
    return "" if found is None or found.some_avg10 is None else f"{found.some_avg10:.1f} %"
