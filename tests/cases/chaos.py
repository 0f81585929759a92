"""The promise under fire: everything at once, while the agent is killed again and again.

Bytes are let through in step with the kills, so that every stream is in the middle of its work at each of
them; what is checked at the end is every byte, every exit code, every count and every caller's answer.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from gcsagent.host.client import Client
from gcsagent.host.streams import Stream
from protocol.types import Reason, Stdio, StreamMode, StreamSpec, WhenFull
from tests.cases import pattern
from tests.cases.target import MIB, OUTPUT, PIPES, Target, connect, executing, expect, running, terminal

RAW_ECHO = """
import os, tty
tty.setraw(0)
os.write(1, b"raw\\n")
left = %d
while left:
    data = os.read(0, 65536)
    left -= len(data)
    while data:
        data = data[os.write(1, data):]
"""

Kill = Callable[[], Awaitable[None]]
"""Kills the agent once and returns when another one answers."""


@dataclass(frozen=True, slots=True)
class Storm:
    """How much of everything, and how many kills."""

    kills: int
    stdout: int
    stdin: int
    tty: int
    spool: int
    execs: int
    seed: int = 1


@dataclass(slots=True)
class Weather:
    """How far the storm is; streams ask it how many of their bytes are due."""

    storm: Storm
    kills: int = 0
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def due(self, done: int, total: int) -> int:
        """Bytes that may be moved now, at least one, of a stream that has moved ``done`` of ``total``."""
        async with self.changed:
            while (allowed := total * (self.kills + 1) // (self.storm.kills + 1) - done) <= 0:
                await self.changed.wait()
        return allowed

    async def rage(self, kill: Kill) -> None:
        dice = random.Random(self.storm.seed)
        for _ in range(self.storm.kills):
            await asyncio.sleep(dice.random() * 0.15)  # when, not whether: any moment is as good
            await kill()
            async with self.changed:
                self.kills += 1
                self.changed.notify_all()


async def weather_the_storm(target: Target, storm: Storm, kill: Kill) -> Weather:
    """Raises AssertionError for the first thing that is not exactly right."""
    weather = Weather(storm)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(_reads_all(target, weather))
        tasks.create_task(_is_read_whole(target, weather))
        tasks.create_task(_talks_raw(target, weather))
        tasks.create_task(_spools(target, weather))
        tasks.create_task(_runs_and_ends(target, weather))
        tasks.create_task(weather.rage(kill))
    return weather


@asynccontextmanager
async def _host(target: Target) -> AsyncIterator[Client]:
    async with await connect(target) as client:
        yield client


async def _reads_all(target: Target, weather: Weather) -> None:
    """A container writes; what arrives is what it wrote."""
    size = weather.storm.stdout
    async with _host(target) as client:
        command = pattern.command(f"write(1, 21, {size})\nsys.exit(21)")
        async with running(target, client, *command, stdio=OUTPUT) as init:
            waiting = asyncio.create_task(init.wait())
            assert await _digest(init.streams["stdout"], weather, size) == pattern.digest(21, size)
            record = await waiting
            assert (record.exit_code, record.streams["stdout"]) == (21, size)


async def _is_read_whole(target: Target, weather: Weather) -> None:
    """A container reads; what it got is what was sent."""
    size = weather.storm.stdin
    async with _host(target) as client, running(target, client, "sha256sum", stdio=PIPES) as init:
        stdin = init.streams["stdin"]
        await _send(stdin, weather, 22, size)
        await init.end_input()
        answered = await expect(init.streams["stdout"], rb"[0-9a-f]{64}")
        assert answered.decode() == pattern.digest(22, size)
        record = await init.wait()
        assert (record.exit_code, record.streams["stdin"]) == (0, size)


async def _spools(target: Target, weather: Weather) -> None:
    """A container writes into a spool that is smaller by far, and waits for its reader."""
    size = weather.storm.spool
    spooled = Stdio(stdout=StreamSpec(StreamMode.SPOOL, MIB, WhenFull.BLOCK))
    async with _host(target) as client:
        command = pattern.command(f"write(1, 24, {size})")
        async with running(target, client, *command, stdio=spooled) as init:
            assert await _digest(init.streams["stdout"], weather, size) == pattern.digest(24, size)
            record = await init.wait()
            assert (record.exit_code, record.streams["stdout"]) == (0, size)


async def _talks_raw(target: Target, weather: Weather) -> None:
    """A raw terminal gives back what is typed, byte for byte."""
    size = weather.storm.tty
    async with _host(target) as client:
        command = ("python3", "-I", "-S", "-c", RAW_ECHO % size)
        async with executing(client, target.box, *command, stdio=terminal()) as process:
            stream = process.streams["tty"]
            await expect(stream, b"raw\n")
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(_send(stream, weather, 23, size))
                echoed = tasks.create_task(_digest(stream, weather, size))
            assert echoed.result() == pattern.digest(23, size)
            assert (await process.wait()).exit_code == 0


async def _runs_and_ends(target: Target, weather: Weather) -> None:
    """Execs begin, are waited for and end meanwhile; each answer is that of its own process, once."""
    count = weather.storm.execs
    async with _host(target) as client:
        for number in range(count):
            await weather.due(number, count)
            code = number % 200
            async with executing(client, target.box, "sh", "-c", f"echo {number}; exit {code}") as process:
                completed = await process.communicate()
            assert completed.stdout == f"{number}\n".encode()
            assert (completed.exit.exit_code, completed.exit.reason) == (code, Reason.EXITED)


async def _digest(stream: Stream, weather: Weather, size: int) -> str:
    total, done = hashlib.sha256(), 0
    while done < size:
        data = await stream.read(min(MIB, await weather.due(done, size)))
        assert data, f"{stream.name} ended after {done} of {size} bytes"
        total.update(data)
        done += len(data)
    return total.hexdigest()


async def _send(stream: Stream, weather: Weather, seed: int, size: int) -> None:
    done = 0
    while done < size:
        step = min(MIB, await weather.due(done, size))
        await stream.write(pattern.take(seed, done, done + step))
        done += step
