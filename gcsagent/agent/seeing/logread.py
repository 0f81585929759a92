"""agent.logs: pages of the log ring, or of the kernel's own."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator

from gcsagent.agent.call import Call
from gcsagent.agent.kmsg import KMSG, RECORD, parse_record
from gcsagent.agent.seeing.logring import LogRing
from protocol.errors import Code, RpcError
from protocol.families.diagnostics import AskLogs, LogEntry, LogPage, LogSource
from protocol.schema import from_wire

ROOM = 512 << 10
"""Bytes of a page from which on it takes no further entry."""

TURN = 128
"""Records of the kernel's read before others have their turn."""

_LEVELS = ("error", "error", "error", "error", "warning", "info", "info", "debug")  # syslog(2)


class LogService:
    def __init__(self, log: LogRing, kmsg: str = KMSG) -> None:
        self._log, self._kmsg = log, kmsg

    async def logs(self, params: AskLogs, _call: Call) -> LogPage:
        if params.source is LogSource.KERNEL:
            return await self._kernel(params)
        ring = self._log.ring
        if params.follow and ring.last <= params.after:
            await self._log.wait(params.after)
        entries, room = list[LogEntry](), ROOM
        for seq in range(max(params.after + 1, ring.first), ring.last + 1):
            room -= len(ring.packed(seq))
            if len(entries) == params.limit or (room < 0 and entries):
                break
            entries.append(from_wire(LogEntry, ring.get(seq)))
        return LogPage(tuple(entries), ring.last, ring.dropped(params.after))

    async def _kernel(self, params: AskLogs) -> LogPage:
        """Its records are numbered from 0; here, as everything, from 1."""
        try:
            fd = os.open(self._kmsg, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise RpcError(
                Code.UNAVAILABLE, f"the kernel's log cannot be read here: {error.strerror}", errno=error.errno
            ) from error
        try:
            page = await _read_page(fd, params)
            while params.follow and not page.entries:
                await _readable(fd)
                page = await _read_page(fd, params)
            return page
        finally:
            os.close(fd)


async def _read_page(fd: int, params: AskLogs) -> LogPage:
    entries: list[LogEntry] = []
    first, last, room = 0, params.after, ROOM
    offset = time.time_ns() - time.monotonic_ns()
    for count, record in enumerate(_records(fd)):
        if count % TURN == TURN - 1:
            await asyncio.sleep(0)
        found = parse_record(record)
        if found is None:
            continue
        last, first = found.number + 1, first or found.number + 1
        if last > params.after and len(entries) < params.limit and room > 0:
            room -= len(found.text) + 100
            name = "kernel" if found.facility == 0 else f"facility {found.facility}"
            when = offset + found.micros * 1000
            level = _LEVELS[found.priority]
            entries.append(LogEntry(last, when, level, LogSource.KERNEL.value, name, found.text))
    return LogPage(tuple(entries), last, max(0, first - 1 - params.after))


def _records(fd: int) -> Iterator[bytes]:
    """Those there are. Raises OSError."""
    while True:
        try:
            record = os.read(fd, RECORD)
        except BlockingIOError:
            return
        except BrokenPipeError:
            continue  # some were overwritten before they were read; the next read has the oldest left
        if not record:
            return
        yield record


async def _readable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(fd, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(fd)
