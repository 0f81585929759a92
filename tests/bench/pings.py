"""How many requests a second one connection gets through, of those that need no runtime."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgpack

from tests.bench.figures import Measured, at_least, figure, in_turn
from tests.bench.host import Host
from tests.cases.agents import REPO, eventually

IN_FLIGHT = 64
COUNT = 20_000
HELLO = msgpack.packb([0, 0, "agent.hello", [{"protocol_min": 1, "protocol_max": 1}]])
PINGS = [msgpack.packb([0, msgid, "agent.ping", [{}]]) for msgid in range(IN_FLIGHT)]


class Pinger:
    """One connection, as plain as can be: what is measured is the other end."""

    def __init__(self, path: str) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.settimeout(20)
        self._sock.connect(path)
        self._unpacker = msgpack.Unpacker()
        self._sock.sendall(HELLO)
        self._answered()

    def rate(self) -> float:
        """Answers a second, each answer followed by the next request."""
        began = time.perf_counter()
        self._sock.sendall(b"".join(PINGS))
        sent, seen = IN_FLIGHT, 0
        while seen < COUNT:
            answered = self._answered()
            seen += len(answered)
            again = answered[: COUNT - sent]
            sent += len(again)
            if again:
                self._sock.sendall(b"".join([PINGS[msgid] for msgid in again]))
        return COUNT / (time.perf_counter() - began)

    def _answered(self) -> list[int]:
        self._unpacker.feed(self._sock.recv(65536))
        answers = list(self._unpacker)
        if any(error is not None for _, _, error, _ in answers):
            raise RuntimeError(f"an error among {answers}")
        return [msgid for _, msgid, _, _ in answers]

    def close(self) -> None:
        self._sock.close()


@contextlib.asynccontextmanager
async def echo(directory: Path) -> AsyncIterator[str]:
    """Runs :mod:`tests.bench.echo`; its address.

    In a session of its own, as the agent is: a busy machine is shared out by sessions (sched(7), autogroup).
    """
    path = str(directory / "echo.sock")
    command = [sys.executable, "-m", "tests.bench.echo", path]
    process = await asyncio.create_subprocess_exec(*command, cwd=REPO, start_new_session=True)
    try:
        if not await asyncio.to_thread(eventually, lambda: os.path.exists(path)):
            raise RuntimeError("the echo does not listen")
        yield path
    finally:
        process.kill()
        await process.wait()
        Path(path).unlink(missing_ok=True)


@figure(
    "ping",
    tier="host",
    what="ping, one connection, 64 in flight",
    baseline="asyncio echo that decodes and encodes the same frames",
    target=at_least(0.60),
    unit="/s",
    samples=15,
)
async def ping(host: Host, samples: int) -> Measured:
    async with echo(host.program.parent) as path:
        ours, theirs = Pinger(host.agent.socket_path), Pinger(path)
        try:
            return await in_turn(
                samples, lambda: asyncio.to_thread(ours.rate), lambda: asyncio.to_thread(theirs.rate)
            )
        finally:
            ours.close()
            theirs.close()
