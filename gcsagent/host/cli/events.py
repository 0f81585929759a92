"""events: what the agent's ring of events holds, and with ``-f`` what happens from then on."""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator
from typing import Any

from gcsagent.host.cli.argument_types import count, identifier, typed
from gcsagent.host.cli.common import complain, connect, describe_oom, print_json, when
from gcsagent.host.cli.declare import Add
from gcsagent.host.cli.logs import moment, since
from gcsagent.host.errors import EventsMissed
from gcsagent.host.events import EventStream
from gcsagent.host.text import printable
from protocol.schema import SchemaError, from_wire
from protocol.types import Event, Oom


def add_events_command(commands: Any, add: Add) -> None:
    parser = add(
        commands,
        "events",
        events,
        "show what has happened, as far as the agent's ring of events goes back",
        "gcsctl events -f --since 10m --container web",
    )
    parser.add_argument("-f", "--follow", action="store_true", help="go on until interrupted")
    parser.add_argument("--container", type=identifier, metavar="ID", help="only those of one container")
    parser.add_argument(
        "--since",
        type=typed(since),
        metavar="T",
        help="begin with those since: 10m, 1h30m, 2026-01-31T12:00:00Z",
    )
    parser.add_argument("--after", type=count, metavar="SEQ", help="begin with those numbered above SEQ")


async def events(args: argparse.Namespace) -> int:
    """With --json one document per line."""
    async with await connect(args) as client:
        since_ns = 0 if args.since is None else await moment(client, args.since)
        # Whoever does not follow has to see the ring's newest event, whichever container's it is.
        wanted = args.container if args.follow else None
        stream = await client.events(after=args.after or 0, container=wanted, strict=True)
        async with stream:
            async for event in _told_of_gaps(stream, args.follow):
                if event.time_ns >= since_ns and args.container in (None, event.container):
                    _show(event, args.json)
    return 0


async def _told_of_gaps(stream: EventStream, follow: bool) -> AsyncIterator[Event]:
    while follow or stream.position < stream.last:
        try:
            event = await anext(stream)
        except EventsMissed as missed:
            complain(str(missed))
        else:
            yield event


def _show(event: Event, as_json: bool) -> None:
    if as_json:
        print_json(event, indent=None)
    else:
        print(_line(event), flush=True)


def _line(event: Event) -> str:
    where = "/".join(name for name in (event.container, event.process) if name)
    data = _oom_line(event) if event.type == "container.oom" else ""
    data = data or " ".join(f"{key}={value}" for key, value in event.data.items())
    return printable(" ".join(part for part in (when(event.time_ns), event.type, where, data) if part))


def _oom_line(event: Event) -> str:
    """Empty when a guest sends something else under this name."""
    try:
        return describe_oom(from_wire(Oom, event.data))
    except SchemaError:
        return ""
