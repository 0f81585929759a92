"""top: what the containers use, live on a terminal, else once."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import termios
import tty
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gcsagent.host.cli.argument_types import interval
from gcsagent.host.cli.common import connect, print_json
from gcsagent.host.cli.declare import Add
from gcsagent.host.cli.resources import size
from gcsagent.host.client import Client
from gcsagent.host.metrics import Sample, metrics, samples
from gcsagent.host.signalling import handled
from gcsagent.host.text import printable

_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"  # the other screen, without a cursor; back
_HOME, _END_OF_LINE, _BELOW = "\x1b[H", "\x1b[K", "\x1b[J"
_HEADER = ("CONTAINER", "CPU", "CPU TIME", "MEMORY", "LIMIT", "PIDS", "READ", "WRITTEN", "OOM KILLS")


@dataclass(frozen=True, slots=True)
class Usage:
    """One container now; ``cpu_percent`` of one CPU, since the reading before."""

    container: str
    running: bool
    cpu_percent: float | None
    cpu_seconds: float
    memory_bytes: int
    memory_limit_bytes: int | None
    pids: int
    read_bytes: int
    written_bytes: int
    oom_kills: int


def add_top_command(commands: Any, add: Add) -> None:
    parser = add(
        commands,
        "top",
        top,
        "show what the containers use: live on a terminal, where q quits; else once",
        "gcsctl --vm dev top --once",
    )
    parser.add_argument("--once", action="store_true", help="print one table, after one interval")
    parser.add_argument(
        "--interval",
        type=interval,
        default=1.0,
        metavar="SECONDS",
        help="between readings, default: %(default)g",
    )


async def top(args: argparse.Namespace) -> int:
    async with await connect(args) as client:
        view = _View(client)
        await view.read()
        if args.once or args.json or not (sys.stdout.isatty() and sys.stdin.isatty()):
            await asyncio.sleep(args.interval)
            usages = await view.read()
            print_json(usages) if args.json else print("\n".join(_table(usages)))
            return 0
        quit_ = asyncio.Event()
        quitting = asyncio.create_task(quit_.wait())
        with _screen(quit_):
            while not quitting.done():
                reading = asyncio.create_task(view.read())
                # An agent that hangs is no reason to stay.
                await asyncio.wait((reading, quitting), return_when=asyncio.FIRST_COMPLETED)
                if not reading.done():
                    reading.cancel()
                    break
                _draw([view.summary, "", *_table(reading.result())])
                await asyncio.wait((quitting,), timeout=args.interval)
    return 0


class _View:
    def __init__(self, client: Client) -> None:
        self._client = client
        self._cpu: dict[str, float] = {}
        self._uptime = 0.0
        self.summary = ""

    async def read(self) -> list[Usage]:
        """Who uses most CPU first. Raises what :func:`gcsagent.host.metrics.metrics` raises."""
        guest: dict[str, float] = {}
        containers: dict[str, dict[str, float]] = {}
        for sample in samples(await metrics(self._client)):
            _sort_in(sample, guest, containers)
        uptime = guest.get("gcs_guest_uptime_seconds", 0.0)
        passed, self._uptime = uptime - self._uptime, uptime
        usages = [self._usage(name, values, passed) for name, values in containers.items()]
        self._cpu = {usage.container: usage.cpu_seconds for usage in usages}
        free, total = (guest.get(f"gcs_guest_memory_{which}_bytes", 0) for which in ("available", "total"))
        self.summary = (
            f"{len(usages)} containers, {guest.get('gcs_guest_cpus', 0):g} CPUs, memory {size(int(free))}"
            f" available of {size(int(total))}, up {uptime:.0f} s (q quits)"
        )
        return sorted(usages, key=lambda usage: (-(usage.cpu_percent or 0), usage.container))

    def _usage(self, name: str, values: dict[str, float], passed: float) -> Usage:
        seconds = values.get("cpu_usage_seconds_total", 0.0)
        before = self._cpu.get(name)
        limit = values.get("memory_limit_bytes")
        return Usage(
            container=name,
            running=bool(values.get("up")),
            cpu_percent=None
            if before is None or passed <= 0
            else max(0.0, (seconds - before) / passed * 100),
            cpu_seconds=seconds,
            memory_bytes=int(values.get("memory_usage_bytes", 0)),
            memory_limit_bytes=None if limit is None else int(limit),
            pids=int(values.get("pids", 0)),
            read_bytes=int(values.get("io_read_bytes_total", 0)),
            written_bytes=int(values.get("io_written_bytes_total", 0)),
            oom_kills=int(values.get("oom_kills_total", 0)),
        )


def _sort_in(sample: Sample, guest: dict[str, float], containers: dict[str, dict[str, float]]) -> None:
    name = sample.name.removeprefix("gcs_container_")
    if sample.labels.keys() == {"container"} and name != sample.name:
        if abs(sample.value) < 2.0**63:  # a guest may say anything; NaN is no number either
            containers.setdefault(sample.labels["container"], {})[name] = sample.value
    elif not sample.labels:
        guest[sample.name] = sample.value if abs(sample.value) < 2.0**63 else 0.0


def _table(usages: list[Usage]) -> list[str]:
    rows = [_HEADER, *(_row(usage) for usage in usages)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _row(usage: Usage) -> tuple[str, ...]:
    if not usage.running:
        return (printable(usage.container, 128), "-", *("",) * (len(_HEADER) - 2))
    return (
        printable(usage.container, 128),
        "-" if usage.cpu_percent is None else f"{usage.cpu_percent:.1f} %",
        f"{usage.cpu_seconds:.1f} s",
        size(usage.memory_bytes),
        size(usage.memory_limit_bytes) or "-",
        str(usage.pids),
        size(usage.read_bytes),
        size(usage.written_bytes),
        str(usage.oom_kills),
    )


def _draw(lines: list[str]) -> None:
    columns, rows = os.get_terminal_size(sys.stdout.fileno())
    shown = "\r\n".join(line[:columns] + _END_OF_LINE for line in lines[:rows])
    sys.stdout.write(_HOME + shown + _BELOW)
    sys.stdout.flush()


@contextlib.contextmanager
def _screen(quit_: asyncio.Event) -> Iterator[None]:
    """The terminal's other screen, keys read as they come; as it was before, however the block is left, and
    while it is stopped (Ctrl-Z)."""
    loop, stdin = asyncio.get_running_loop(), sys.stdin.fileno()
    saved = termios.tcgetattr(stdin)

    def enter() -> None:
        tty.setcbreak(stdin, termios.TCSANOW)
        sys.stdout.write(_ENTER)
        sys.stdout.flush()

    def leave() -> None:
        with contextlib.suppress(OSError, termios.error):  # the terminal may be gone
            termios.tcsetattr(stdin, termios.TCSANOW, saved)
            sys.stdout.write(_LEAVE)
            sys.stdout.flush()

    def on_key() -> None:
        keys = os.read(stdin, 64)
        if not keys or set(keys) & set(b"qQ"):
            quit_.set()

    def on_stop(number: signal.Signals) -> None:
        leave()
        # The kernel's own stop, which it does without where nobody could continue us.
        ours = signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
        signal.signal(number, ours)
        enter()

    try:
        with (
            handled((signal.SIGTERM, signal.SIGINT, signal.SIGHUP), lambda _: quit_.set()),
            handled((signal.SIGTSTP,), on_stop),
        ):
            enter()
            loop.add_reader(stdin, on_key)
            yield
    finally:
        loop.remove_reader(stdin)
        leave()
