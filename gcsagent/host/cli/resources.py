"""The commands about what a container uses and may use."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import Any

from gcsagent.host.cli.argument_types import add_id, require, typed
from gcsagent.host.cli.common import UsageError, connect, print_json, print_table
from gcsagent.host.cli.declare import Add
from protocol import checks
from protocol.checks import UNLIMITED
from protocol.usage import ContainerStats, IoLimit, Pressure

_SIZE = re.compile(r"([0-9]{1,15})([KMGkmg]?)\Z", re.ASCII)


def add_resource_commands(commands: Any, add: Add) -> None:
    add_id(add(commands, "stats", stats, "show what a container uses", "gcsctl stats web"))
    parser = add(commands, "update", update, "change a container's limits", "gcsctl update --memory 64M web")
    _add_limits(parser)
    add_id(parser)


async def stats(args: argparse.Namespace) -> int:
    async with await connect(args) as client:
        show_stats(await client.container_stats(args.id), args.json)
    return 0


def show_stats(found: ContainerStats, as_json: bool) -> None:
    if as_json:
        print_json(found)
    else:
        print_table(("WHAT", "NOW", "LIMIT", "PEAK", "PRESSURE"), _rows(found))


async def update(args: argparse.Namespace) -> int:
    wanted = {name: value for name in _LIMITS if (value := getattr(args, name)) is not None}
    devices = _io_limits(args)
    if not wanted and not devices:
        raise UsageError("nothing to update: give --memory, --cpus, --pids, --io-write-bps ... (see --help)")
    async with await connect(args) as client:
        await client.update_container(args.id, **wanted, io=devices)
    if args.json:
        print_json({"container": args.id, **wanted, **({"io": devices} if devices else {})})
    return 0


def parse_size(text: str) -> int:
    """Bytes from ``64M``, ``1G``, ``512k`` (of 1024) or a plain number. Raises ValueError."""
    match = _SIZE.match(text)
    if match is None:
        raise ValueError("give a number of bytes, or one with K, M or G, like 64M")
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2].upper()]


def _add_limits(parser: argparse.ArgumentParser) -> None:
    """The options of ``update``; -1 takes a limit away."""
    for option, field, parse, metavar, help_ in _OPTIONS:
        parser.add_argument(option, dest=field, type=typed(parse), metavar=metavar, help=help_)
    for field, what in _IO.items():
        parser.add_argument(
            f"--io-{field.replace('_', '-')}",
            dest=field,
            action="append",
            default=[],
            type=typed(_io_limit),
            metavar="DEV:N",
            help=f"{what}; DEV is MAJ:MIN or /dev/... in the guest; may be repeated",
        )


def _limit(text: str) -> int:
    return UNLIMITED if text == "-1" else parse_size(text)


def _count(text: str) -> int:
    if text != "-1" and not (text.isascii() and text.isdigit() and len(text) <= 12):
        raise ValueError("give a number")
    return int(text)


def _cpus(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError("give a number") from None
    require(checks.cpus(value))
    return value


def _cpuset(text: str) -> str:
    require(checks.cpuset(text))
    return text


def _io_limit(text: str) -> tuple[str, int]:
    """A device's name may hold colons: the last one parts it from the number."""
    device, _, number = text.rpartition(":")
    require(checks.device(device))
    return device, parse_size(number)


def _io_limits(args: argparse.Namespace) -> list[IoLimit]:
    by_device: dict[str, dict[str, int]] = {}
    for field in _IO:
        for device, number in getattr(args, field):
            by_device.setdefault(device, {})[field] = number
    return [IoLimit(device, **limits) for device, limits in by_device.items()]


_OPTIONS: tuple[tuple[str, str, Callable[[str], Any], str, str], ...] = (
    ("--memory", "memory_bytes", _limit, "SIZE", "bytes, or with K, M, G: 64M; -1: no limit"),
    ("--memory-swap", "memory_swap_bytes", _limit, "SIZE", "memory and swap together; -1: no limit"),
    ("--memory-reservation", "memory_reservation_bytes", parse_size, "SIZE", "taken from it last"),
    ("--cpus", "cpus", _cpus, "N", "0.5 is half of one; -1: no limit"),
    ("--cpu-shares", "cpu_shares", _count, "N", "its part of scarce CPU time; 1024 is the usual one"),
    ("--cpuset-cpus", "cpuset_cpus", _cpuset, "LIST", "CPUs it may run on: 0-2,7"),
    ("--cpuset-mems", "cpuset_mems", _cpuset, "LIST", "memory nodes it may use: 0"),
    ("--pids", "pids", _count, "N", "processes and threads; -1: no limit"),
    ("--io-weight", "io_weight", _count, "N", "its part of scarce I/O, 10 to 1000; few kernels have it"),
)
_LIMITS = tuple(field for _, field, *_ in _OPTIONS)
_IO = {
    "read_bps": "bytes read in a second, with K, M, G",
    "write_bps": "bytes written in a second",
    "read_iops": "reads in a second",
    "write_iops": "writes in a second; 0: no limit",
}


def _rows(found: ContainerStats) -> list[tuple[str, ...]]:
    memory, cpu, pids, io = found.memory, found.cpu, found.pids, found.io
    throttled = f", throttled {_seconds(cpu.throttled_us)}" if cpu.throttled_us else ""
    cpus = "" if cpu.limit is None else f"{cpu.limit:g} CPUs"
    return [
        (
            "memory",
            size(memory.current),
            size(memory.limit),
            size(memory.peak),
            _pressure(found.memory_pressure),
        ),
        ("working set", size(memory.working_set), "", "", ""),
        ("swap", size(memory.swap), size(memory.swap_limit), "", ""),
        ("cpu", _seconds(cpu.usage_us) + throttled, cpus, "", _pressure(found.cpu_pressure)),
        ("pids", _count_of(pids.current), _count_of(pids.limit), "", ""),
        ("read", size(io.read_bytes), _io_limit_of(io.limits, "read"), "", _pressure(found.io_pressure)),
        ("written", size(io.write_bytes), _io_limit_of(io.limits, "write"), "", ""),
    ]


def _io_limit_of(limits: tuple[IoLimit, ...], way: str) -> str:
    parts = []
    for limit in limits:
        bps, iops = getattr(limit, f"{way}_bps"), getattr(limit, f"{way}_iops")
        parts += [f"{limit.device} {size(bps)}/s"] if bps else []
        parts += [f"{limit.device} {iops}/s"] if iops else []
    return ", ".join(parts)


def size(count: int | None) -> str:
    if count is None:
        return ""
    for shift, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 1 << shift:
            return f"{count / (1 << shift):.1f} {unit}"
    return f"{count} B"


def _seconds(micros: int | None) -> str:
    return "" if micros is None else f"{micros / 1e6:.3f} s"


def _count_of(count: int | None) -> str:
    return "" if count is None else str(count)


def _pressure(found: Pressure | None) -> str:
    """Percent of the last ten seconds in which something waited."""
    return "" if found is None or found.some_avg10 is None else f"{found.some_avg10:.1f} %"
