"""The commands that show how the agent is doing: its numbers, its stacks, its log."""

from __future__ import annotations

import argparse
import sys
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

from gcsagent.host.agentlog import AgentLog
from gcsagent.host.cli.argument_types import count
from gcsagent.host.cli.colour import Colour, paint
from gcsagent.host.cli.common import complain, connect, print_json, when
from gcsagent.host.cli.declare import Add
from gcsagent.host.cli.logs import add_since, moment
from gcsagent.host.metrics import metrics, samples
from gcsagent.host.text import printable
from protocol.families.diagnostics import Level, LogEntry, LogLevel, LogSource, SetLogLevel, Stacks
from protocol.method import Empty

_COLOURS = {"warning": Colour.YELLOW, "error": Colour.RED, "critical": Colour.RED}


def add_seeing_commands(commands: Any, add: Add) -> None:
    add(
        commands,
        "metrics",
        show_metrics,
        "print numbers about agent, supervisor, containers and streams, in Prometheus' text format",
        "gcsctl --vm dev metrics > /var/lib/node_exporter/dev.prom",
    )
    add(
        commands,
        "stacks",
        show_stacks,
        "show where every thread and task of the agent is",
        "gcsctl --vm dev stacks",
    )
    parser = add(
        commands,
        "log-level",
        log_level,
        "show or change what agent and supervisor log; lasts until the supervisor ends",
        "gcsctl --vm dev log-level debug",
    )
    parser.add_argument("level", nargs="?", choices=[level.value for level in Level], metavar="LEVEL")
    parser = add(
        commands,
        "agent-logs",
        agent_logs,
        "show the log of agent and supervisor, which outlives restarts of the agent, or the kernel's",
        "gcsctl --vm dev agent-logs -f --tail 20",
    )
    parser.add_argument("-f", "--follow", action="store_true", help="go on until interrupted")
    add_since(parser)
    parser.add_argument("--tail", type=count, metavar="N", help="the last N entries")
    parser.add_argument("--kernel", action="store_true", help="the guest's kernel's log")


async def show_metrics(args: argparse.Namespace) -> int:
    async with await connect(args) as client:
        text = await metrics(client)
    if args.json:
        print_json(samples(text))
    else:
        print(text, end="", flush=True)
    return 0


async def show_stacks(args: argparse.Namespace) -> int:
    async with await connect(args) as client:
        found: Stacks = await client.call("agent.stacks", Empty())
    if args.json:
        print_json(found)
        return 0
    for line in found.text.splitlines():
        print(printable(line))
    if found.truncated:
        complain("there is more than fits")
    return 0


async def log_level(args: argparse.Namespace) -> int:
    async with await connect(args) as client:
        wanted = Level(args.level) if args.level else None
        found: LogLevel = await client.call("agent.log_level", SetLogLevel(wanted))
    print_json(found) if args.json else print(found.level.value)
    return 0


async def agent_logs(args: argparse.Namespace) -> int:
    """With --json one document per line."""
    async with await connect(args) as client:
        log = AgentLog(client, LogSource.KERNEL if args.kernel else LogSource.AGENT)
        since_ns = 0 if args.since is None else await moment(client, args.since)
        newest: deque[LogEntry] = deque(maxlen=args.tail)
        async for entry in log.entries():
            if entry.time_ns >= since_ns:
                newest.append(entry)
        if args.tail is None and log.dropped:
            complain(f"{log.dropped} entries before these are no longer there")
        for entry in newest:
            _show_entry(entry, args.json)
        told = log.dropped
        async for entry in _further(log, args.follow):
            if log.dropped > told:
                complain(f"{log.dropped - told} entries were missed: the guest no longer had them")
                told = log.dropped
            _show_entry(entry, args.json)
    return 0


async def _further(log: AgentLog, follow: bool) -> AsyncIterator[LogEntry]:
    if follow:
        async for entry in log.entries(follow=True):
            yield entry


def _show_entry(entry: LogEntry, as_json: bool) -> None:
    if as_json:
        print_json(entry, indent=None)
        return
    fields = " ".join(f"{key}={value}" for key, value in entry.fields.items())
    said = " ".join(part for part in (f"{entry.name}:", entry.message, fields) if part)
    stamp, level = when(entry.time_ns, milliseconds=True), printable(entry.level.upper())
    if entry.level in _COLOURS:
        level = paint(level, _COLOURS[entry.level], sys.stdout)
    print(" ".join(part for part in (stamp, level, printable(said, 20_000)) if part), flush=True)
