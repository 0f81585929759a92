"""What stands behind the streams of a process that gcsctl makes."""

from __future__ import annotations

import argparse
import dataclasses
import os

from gcsagent.host import terminal
from gcsagent.host.cli.common import UsageError
from gcsagent.host.transport import Address
from protocol.address import UnixAddress
from protocol.types import Stdio, StreamMode, StreamSpec, WhenFull, Winsize

FIFOS = ("stdin", "stdout", "stderr")

_STREAM = StreamSpec(StreamMode.STREAM)
_NULL = StreamSpec()
_LOG = StreamSpec(StreamMode.SPOOL, when_full=WhenFull.DROP_OLDEST)
_SHOWN_LOG = dataclasses.replace(_LOG, tee=True)


def wanted(args: argparse.Namespace, address: Address, *, quiet: bool, log: bool) -> Stdio:
    """``quiet``: nobody attaches now, so output that nobody asked for goes nowhere instead of blocking.

    ``log``: it is kept, as far as there is room; what is shown here is shown in full. Raises UsageError.
    """
    if args.tty:
        if args.fifo:
            raise UsageError("--fifo cannot be given with -t: a terminal is one stream, and no pipe")
        size = terminal.winsize(0, 1, 2) or Winsize()
        return Stdio(tty=_STREAM, terminal=True, winsize=size)
    kept = _LOG if quiet else _SHOWN_LOG
    output = kept if log else _NULL if quiet and not args.interactive else _STREAM
    once = args.interactive and not quiet
    stdio = Stdio(_STREAM if args.interactive else _NULL, output, output, stdin_once=once)
    for name, path in args.fifo:
        if name == "stdin" and args.interactive:
            raise UsageError("-i and --fifo stdin=PATH are two inputs: give one of them")
        fifo = StreamSpec(StreamMode.FIFO, path=guest_path("--fifo", path, address))
        stdio = dataclasses.replace(stdio, **{name: fifo})  # type: ignore[arg-type]  # one of FIFOS
    return stdio


def guest_path(option: str, path: str, address: Address) -> str:
    """``path`` as the agent sees it: over ``unix:`` that is this machine, so relative ones work too."""
    if isinstance(address, UnixAddress):
        return os.path.abspath(path)
    if not path.startswith("/"):
        raise UsageError(f"{option} {path}: give an absolute path in the guest")
    return path
