"""How fast bytes move: out of a container, into one, kept on the way, many at once.

The program at the far end is bytes.c on either side of the ratio; what is compared is what is between it and
this host. A host client of ours reads, because that is what users have.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time

from gcsagent.host.client import Client
from gcsagent.host.process import RemoteProcess
from gcsagent.host.spec import exec_spec
from protocol.families.process import Exec
from protocol.types import Stdio, StreamMode, StreamSpec, WhenFull
from tests.bench.figures import Measured, at_least, figure, in_turn
from tests.bench.host import BOX, PROGRAM, Host
from tests.cases.target import MIB, STREAM, forget

OUT, IN, SPOOLED, EACH = 2048 * MIB, 1024 * MIB, 512 * MIB, 64 * MIB
STREAMS = 16
CHUNK = 1 << 20
SPOOL = StreamSpec(StreamMode.SPOOL, limit=64 * MIB, when_full=WhenFull.BLOCK)
RATE = 1 / MIB
_numbers = itertools.count(1)


def new_name(stem: str) -> str:
    return f"{stem}{next(_numbers)}"


async def leave(client: Client, process: RemoteProcess) -> None:
    process.detach()
    await forget(client, process)


async def read(client: Client, count: int, spec: StreamSpec = STREAM) -> float:
    """Bytes a second of ``count`` zeros out of the box, from the request to the last byte."""
    began = time.perf_counter()
    params = Exec(BOX, new_name("out"), exec_spec(args=(PROGRAM, "zeros", str(count))), Stdio(stdout=spec))
    process = await RemoteProcess.exec(client, params)
    stream, seen = process.streams["stdout"], 0
    while seen < count and (data := await stream.read(CHUNK)):
        seen += len(data)
    took = time.perf_counter() - began
    await leave(client, process)
    if seen != count:
        raise RuntimeError(f"{seen} of {count} bytes came")
    return count / took


async def write(client: Client, count: int) -> float:
    """Likewise into the box: to the reader's end, who has counted."""
    data = bytes(CHUNK)
    began = time.perf_counter()
    spec = exec_spec(args=(PROGRAM, "drain", str(count)))
    params = Exec(BOX, new_name("in"), spec, Stdio(stdin=STREAM))
    process = await RemoteProcess.exec(client, params)
    for _ in range(count // CHUNK):
        await process.streams["stdin"].write(data)
    record = await process.wait()
    took = time.perf_counter() - began
    await leave(client, process)
    if record.exit_code:
        raise RuntimeError(f"the reader ended with {record}")
    return count / took


def piped(source: list[str], sink: list[str], count: int) -> float:
    """Two programs and a pipe; seconds until both have ended."""
    began = time.perf_counter()
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    null = (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0)
    quiet = (os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0)
    first = os.posix_spawnp(
        source[0], source, os.environ, file_actions=[null, (os.POSIX_SPAWN_DUP2, write_end, 1)]
    )
    second = os.posix_spawnp(
        sink[0], sink, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, read_end, 0), quiet]
    )
    os.close(read_end)
    os.close(write_end)
    statuses = [os.waitpid(pid, 0)[1] for pid in (first, second)]
    if any(statuses):
        raise RuntimeError(f"they ended with {statuses}")
    return count / (time.perf_counter() - began)


@figure(
    "stdout",
    tier="host",
    what="stdout, 2 GiB, container to host client",
    baseline="`runc exec` into a C reader",
    target=at_least(0.85),
    unit="MiB/s",
    scale=RATE,
    samples=9,
)
async def stdout(host: Host, samples: int) -> Measured:
    source = host.bare_exec(PROGRAM, "zeros", str(OUT))

    async def theirs() -> float:
        return piped(source, [str(host.program), "drain", str(OUT)], OUT)

    return await in_turn(samples, lambda: read(host.client, OUT), theirs)


@figure(
    "stdin",
    tier="host",
    what="stdin, 1 GiB, host client to container",
    baseline="a C writer into `runc exec`",
    target=at_least(0.85),
    unit="MiB/s",
    scale=RATE,
    samples=9,
)
async def stdin(host: Host, samples: int) -> Measured:
    sink = [*host.runc, "exec", BOX, PROGRAM, "drain", str(IN)]

    async def theirs() -> float:
        return piped([str(host.program), "zeros", str(IN)], sink, IN)

    return await in_turn(samples, lambda: write(host.client, IN), theirs)


@figure(
    "spool",
    tier="host",
    what="stdout in mode `spool`, 512 MiB, acknowledged as it is read",
    baseline="the same in mode `stream`",
    target=at_least(0.5),
    unit="MiB/s",
    scale=RATE,
    samples=9,
)
async def spool(host: Host, samples: int) -> Measured:
    return await in_turn(
        samples, lambda: read(host.client, SPOOLED, SPOOL), lambda: read(host.client, SPOOLED)
    )


@figure(
    "streams-16",
    tier="host",
    what="16 streams at once, 64 MiB each, total",
    baseline="one stream, as many bytes",
    target=at_least(0.9),
    unit="MiB/s",
    scale=RATE,
    samples=9,
)
async def sixteen(host: Host, samples: int) -> Measured:
    """Of processes that run already: what is compared is moving bytes, not starting 16 processes."""

    async def ours() -> float:
        return await at_once(host.client, STREAMS, EACH)

    return await in_turn(samples, ours, lambda: at_once(host.client, 1, STREAMS * EACH))


async def at_once(client: Client, streams: int, count: int) -> float:
    """Each waits for a line before it writes, so that all begin together."""
    shell = ("sh", "-c", f"read line; exec {PROGRAM} zeros {count}")
    stdio = Stdio(stdin=STREAM, stdout=STREAM)
    processes = [
        await RemoteProcess.exec(client, Exec(BOX, new_name("s"), exec_spec(args=shell), stdio))
        for _ in range(streams)
    ]
    began = time.perf_counter()
    await asyncio.gather(*(_release(process, count) for process in processes))
    took = time.perf_counter() - began
    for process in processes:
        await leave(client, process)
    return streams * count / took


async def _release(process: RemoteProcess, count: int) -> None:
    await process.streams["stdin"].write(b"\n")
    stream, seen = process.streams["stdout"], 0
    while seen < count and (data := await stream.read(CHUNK)):
        seen += len(data)
    if seen != count:
        raise RuntimeError(f"{seen} of {count} bytes came")
