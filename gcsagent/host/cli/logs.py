"""logs: what a process wrote, as far as its log reaches back, and with ``-f`` what it goes on to write."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
from datetime import datetime
from typing import Any

from gcsagent.host.cli.argument_types import add_id, count, identifier, typed
from gcsagent.host.cli.common import UsageError, complain, connect, print_json
from gcsagent.host.cli.declare import Add
from gcsagent.host.client import Client
from gcsagent.host.localio import LocalWriter
from gcsagent.host.process import STDERR, STREAM_END, first_error
from gcsagent.host.spool import SpoolStream
from protocol import checks
from protocol.errors import Code, RpcError
from protocol.families.stream import StreamName
from protocol.types import StreamMode

_UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PART = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|[smhd])")
_DELETED = "container.deleted"


def add_logs_command(commands: Any, add: Add) -> None:
    parser = add(
        commands,
        "logs",
        logs,
        "show what a process wrote, of `run -d`, `run --log` and `exec -d --log`",
        "gcsctl logs -f --tail 10 web",
    )
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the process's output ends")
    add_since(parser)
    parser.add_argument("--tail", type=count, metavar="N", help="the last N lines of each stream")
    parser.add_argument(
        "--process", type=identifier, default=checks.INIT, metavar="P", help="default: %(default)s"
    )
    add_id(parser)


def add_since(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--since", type=typed(since), metavar="T", help="from then on: 10m, 1h30m, 2026-01-31T12:00:00Z"
    )


async def logs(args: argparse.Namespace) -> int:
    """Writes stdout and stderr of the process to ours. The lines of one come in order; the two are apart."""
    async with await connect(args) as client, contextlib.AsyncExitStack() as stack:
        names = await _logged(client, args)
        since_ns = None if args.since is None else await moment(client, args.since)
        streams: dict[str, SpoolStream] = {}
        for name in names:
            where = args.id, args.process, StreamName(name)
            found = await client.find_in_stream(*where, since_ns=since_ns, tail=args.tail)
            stream = await client.attach_spool(*where, offset=found.offset, acknowledge=False, passive=True)
            streams[name] = await stack.enter_async_context(stream)
            if not args.follow:
                stream.finish_at(found.end)
        with first_error():
            async with asyncio.TaskGroup() as tasks:
                for stream in streams.values():
                    tasks.create_task(_show(stream, args.json))
                if args.follow:
                    await _tell_ends(client, args.id, args.process, streams)
    return 0


def since(text: str) -> float | int:
    """A moment as nanoseconds since the epoch, or how long ago as seconds, a float. Raises ValueError."""
    if _PART.sub("", text) == "" and text:
        return float(sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(text)))
    try:
        return int(float(text) * 1e9) if re.fullmatch(r"[0-9]{1,11}(\.[0-9]+)?", text) else _timestamp(text)
    except (ValueError, OverflowError) as error:
        raise ValueError("give how long ago (90s, 1h30m), or when (2026-01-31T12:00:00Z)") from error


def _timestamp(text: str) -> int:
    moment = datetime.fromisoformat(text)
    return max(0, int(moment.timestamp() * 1e9))


async def moment(client: Client, wanted: float | int) -> int:
    """How long ago counts by the guest's clock, which is the one its log is stamped with."""
    if isinstance(wanted, int):
        return wanted
    now = (await client.info()).time_ns
    return max(0, now - int(wanted * 1e9))


async def _logged(client: Client, args: argparse.Namespace) -> list[str]:
    state = await client.process_state(args.id, args.process)
    names = [name for name, stream in state.streams.items() if stream.mode is StreamMode.SPOOL]
    if not names:
        raise UsageError(
            f"{args.process} of {args.id} has no log; `run -d`, `run --log` and `exec -d --log` keep one"
        )
    return names


async def _show(stream: SpoolStream, as_json: bool) -> None:
    writer = LocalWriter(1 if as_json or stream.name != STDERR else 2)
    reported = 0
    try:
        while True:
            data = await stream.read()
            if stream.dropped > reported:
                complain(f"{stream.name}: {stream.dropped - reported} bytes are missing: the log was full")
                reported = stream.dropped
            if not data:
                return
            if as_json:
                text = data.decode(errors="replace")
                offset = stream.position - len(data)
                print_json({"stream": stream.name, "offset": offset, "text": text}, indent=None)
            else:
                await writer.write(data)
    finally:
        writer.close()


async def _tell_ends(client: Client, container: str, process: str, streams: dict[str, SpoolStream]) -> None:
    """Tells each stream where it ends, once that is known. Subscribed first: no event can be missed."""
    waiting = dict(streams)
    async with await client.events(container=container) as events:
        try:
            state = await client.process_state(container, process)
        except RpcError as error:
            if error.code is not Code.NOT_FOUND:
                raise
            return  # deleted: the readers find out by themselves
        for name, stream in state.streams.items():
            if name in waiting and stream.ended:
                waiting.pop(name).finish_at(stream.bytes)
        while waiting:
            event = await anext(events)
            if event.type == _DELETED:
                return
            if (event.type, event.process) == (STREAM_END, process):
                ending, total = waiting.pop(str(event.data.get("stream")), None), event.data.get("bytes")
                if ending is not None and isinstance(total, int):
                    ending.finish_at(total)
