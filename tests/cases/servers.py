"""A server from Debian in a container, and its own clients on this machine, through a forward."""

from __future__ import annotations

import asyncio
import re
import subprocess
from dataclasses import dataclass

from protocol.families.forward import OpenForward
from tests.cases.forwards import forwarding
from tests.cases.target import OUTPUT, Target, connect, expect, running

CLIENT_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Load:
    """``reconnecting``: requests that each get a connection of their own."""

    clients: int
    requests: int
    reconnecting: int
    large: int


FULL = Load(clients=50, requests=6_000, reconnecting=500, large=500)
UNDER_EMULATION = Load(clients=50, requests=1_500, reconnecting=60, large=100)


async def redis_under_load(target: Target, rootfs: str, load: Load) -> str:
    """What redis-benchmark says; it gives up at the first error. ``rootfs`` has it, on this machine."""
    config = ("--save", "", "--appendonly", "no", "--loglevel", "notice")
    async with (
        await connect(target) as client,
        running(target, client, "redis-server", *config, stdio=OUTPUT) as server,
    ):
        await expect(server.streams["stdout"], b"Ready to accept connections")
        async with forwarding(client, OpenForward(server.container, 6379)) as (port, errors):
            clients = ("-c", str(load.clients))
            said = [
                await _redis(target, rootfs, "benchmark", port, *clients, "-n", str(number), *options)
                for number, options in (
                    (load.requests, ("-t", "ping,set,get,incr,lpush,lrange_100,mset")),
                    (load.requests, ("-t", "set,get", "-P", "32")),
                    (load.large, ("-t", "set,get", "-d", "65536", "-r", "50")),
                    (load.reconnecting, ("-t", "get", "-k", "0")),
                )
            ]
            info = await _redis(target, rootfs, "cli", port, "info", "stats")
            assert not errors, errors
    counts = dict(re.findall(r"(\w+):([0-9]+)", info))
    assert int(counts["total_connections_received"]) > load.reconnecting
    assert int(counts["rejected_connections"]) == 0
    return "\n".join(line for each in said for line in re.findall(r"\S+.* requests per second.*", each))


async def _redis(target: Target, rootfs: str, program: str, port: int, *options: str) -> str:
    quiet = ("-q",) if program == "benchmark" else ()
    process = await asyncio.create_subprocess_exec(
        *("chroot", rootfs, f"redis-{program}", "-h", "127.0.0.1", "-p", str(port), *quiet, *options),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(), CLIENT_SECONDS * max(1, target.pace / 4))
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, out.decode() + err.decode()
    assert b"Error" not in out + err, out + err
    return out.decode().replace("\r", "\n")
