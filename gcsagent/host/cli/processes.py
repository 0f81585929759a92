"""``gcsctl ps ID``: what docker top shows, and which of it the runtime made."""

from __future__ import annotations

import time
from collections.abc import Sequence

from gcsagent.host.cli.common import print_json, print_table
from gcsagent.host.cli.resources import size
from protocol.usage import ContainerProcess

_HEADER = ("PID", "NSPID", "PPID", "UID", "PROCESS", "STATE", "AGE", "CPU", "RSS", "COMMAND")


def show_processes(processes: Sequence[ContainerProcess], as_json: bool) -> None:
    if as_json:
        print_json(processes)
    else:
        print_table(_HEADER, [_row(process) for process in processes])


def _row(process: ContainerProcess) -> tuple[object, ...]:
    return (
        process.pid,
        process.ns_pid or "-",
        process.ppid,
        process.uid,
        process.process if process.created_by_runtime else "-",
        f"{process.state} zombie" if process.zombie else process.state,
        age(process.started_at_ns),
        f"{process.cpu_us / 1e6:.2f}",
        size(process.rss_bytes),
        process.command,
    )


def age(since_ns: int) -> str:
    return span(time.time() - since_ns / 1e9)


def span(seconds: float) -> str:
    """In the largest unit that it has one of."""
    for length, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= length:
            return f"{int(seconds // length)}{unit}"
    return f"{max(0, int(seconds))}s"
