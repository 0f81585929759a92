"""``gcsctl cp``: files between here and a guest, as ``docker cp`` does it."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from gcsagent.host import copy
from gcsagent.host.cli.common import UsageError, complain, connect, print_json
from gcsagent.host.cli.declare import Add
from gcsagent.host.cli.resources import parse_size, size
from gcsagent.host.cli.signals import Signals
from gcsagent.host.copy import Manner
from gcsagent.host.localio import LocalReader, LocalWriter
from protocol import checks

STEP_SECONDS = 0.2
"""How often progress is shown."""

_REMOTE = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]*)?:(.*)\Z", re.DOTALL)


def add_copy_command(commands: Any, add: Add) -> None:
    parser = add(
        commands,
        "cp",
        cp,
        "copy files between here and a container (ID:PATH) or the guest itself (:PATH); - is a tar archive"
        " on standard input or output",
        "gcsctl cp ./site web:/srv/www; gcsctl cp :/var/log ./logs; gcsctl cp web:/etc - | tar t",
    )
    parser.add_argument(
        "-a", "--archive", action="store_true", help="keep owners, set-id bits, attributes and devices, too"
    )
    parser.add_argument("-L", "--follow-link", action="store_true", help="copy what a symlink SRC leads to")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress")
    parser.add_argument(
        "--max-size",
        type=parse_size,
        default=copy.MAX_BYTES,
        metavar="SIZE",
        help="most that a guest may send, default: 64G",
    )
    parser.add_argument("source", metavar="SRC", help="PATH, ID:PATH, :PATH or -; DIR/. is what is in DIR")
    parser.add_argument("target", metavar="DST", help="likewise; into it, if it is a directory, else as it")


@dataclass(frozen=True, slots=True)
class Remote:
    """A path in a container, or for None in the guest itself."""

    container: str | None
    path: str


def place(text: str) -> Remote | str:
    """What an argument names. Paths here that have a colon begin with ``/`` or ``./``. Raises UsageError."""
    if text.startswith(("/", ".")) or ":" not in text:
        return text
    match = _REMOTE.match(text)
    if match is None:
        raise UsageError(f"{text}: no id before the colon; ./{text} is a file here")
    path = match[2] if match[2].startswith("/") else f"/{match[2]}"
    problem = checks.absolute_path(path)
    if problem is not None:
        raise UsageError(f"{text}: the path {problem}")
    return Remote(match[1], path)


async def cp(args: argparse.Namespace) -> int:
    """Raises UsageError, CannotCopy, RpcError."""
    source, target = place(args.source), place(args.target)
    meter = Meter(args.source, shown=sys.stderr.isatty() and not args.quiet)
    manner = Manner(
        archive=args.archive, follow=args.follow_link, max_bytes=args.max_size, progress=meter.add
    )
    with Signals(), meter:
        if isinstance(source, str) and isinstance(target, Remote):
            found = await _to_guest(args, source, target, manner)
        elif isinstance(source, Remote) and isinstance(target, str):
            found = await _from_guest(args, source, target, manner)
        else:
            raise UsageError("give one path here and one in the guest, as ID:PATH or :PATH")
    if found["skipped"]:
        complain(f"{found['skipped']} things were left out: sockets, devices, unsupported attributes")
    if args.json:
        print_json(found, to_stderr=target == "-")
    return 0


async def _to_guest(args: argparse.Namespace, source: str, target: Remote, manner: Manner) -> dict[str, int]:
    async with await connect(args) as client:
        if source == "-":
            if os.isatty(0):
                raise UsageError("- reads a tar archive from standard input, which is a terminal")
            result = await copy.upload_archive(client, _stdin(), target.container, target.path, manner)
        else:
            result = await copy.upload(client, source, target.container, target.path, manner)
    return {"bytes": result.bytes, "entries": result.entries, "skipped": result.skipped}


async def _from_guest(
    args: argparse.Namespace, source: Remote, target: str, manner: Manner
) -> dict[str, int]:
    async with await connect(args) as client:
        if target != "-":
            result, tally = await copy.download(client, source.container, source.path, target, manner)
            skipped = result.skipped + tally.skipped
            return {"bytes": result.bytes, "entries": tally.entries, "skipped": skipped}
        if os.isatty(1):
            raise UsageError("- writes a tar archive to standard output, which is a terminal")
        out = LocalWriter(1)
        try:
            result = await copy.download_archive(client, source.container, source.path, out.write, manner)
        finally:
            out.close()
    return {"bytes": result.bytes, "entries": result.entries, "skipped": result.skipped}


async def _stdin() -> AsyncIterator[bytes]:
    reader = LocalReader(0)
    while data := await reader.read(copy.CHUNK):
        yield data


class Meter:
    """One line on a terminal that says how far it is, and goes when it is through."""

    def __init__(self, what: str, *, shown: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._what, self._shown, self._clock = what, shown, clock
        self._began = self._said = clock()
        self._bytes = 0
        self._width = 0

    def add(self, count: int) -> None:
        self._bytes += count
        now = self._clock()
        if self._shown and now - self._said >= STEP_SECONDS:
            self._said = now
            self._show(
                f"{self._what}: {size(self._bytes)}, {size(round(self._bytes / (now - self._began)))}/s"
            )

    def _show(self, line: str) -> None:
        sys.stderr.write(f"\r{line:<{self._width}}")
        sys.stderr.flush()
        self._width = len(line)

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._width:
            self._show("")
            sys.stderr.write("\r")
            sys.stderr.flush()
