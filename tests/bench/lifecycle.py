"""A container's whole life, and what the same steps cost with runc alone."""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import json
import os
import time
from pathlib import Path
from typing import Any

from tests.bench.figures import Measured, at_most, figure, in_turn
from tests.bench.host import Host, quiet
from tests.cases.target import creation

_PR_SET_CHILD_SUBREAPER = 36
_numbers = itertools.count(1)


@figure(
    "life",
    tier="host",
    what="create + start + wait + delete of `true`",
    baseline="`runc` doing the same steps",
    target=at_most(1.10),
    scale=1000,
    samples=40,
)
async def life(host: Host, samples: int) -> Measured:
    bundle = await same_bundle(host)

    async def bare() -> float:
        return theirs(host, bundle)

    return await in_turn(samples, lambda: ours(host), bare, seconds=60)


async def ours(host: Host) -> float:
    ident = f"life{next(_numbers)}"
    params = creation(host.target, ident, ("true",), overlay=False)
    began = time.perf_counter()
    await host.client.create_container(params)
    await host.client.start_container(ident)
    record = await host.client.wait_container(ident)
    await host.client.delete_container(ident)
    took = time.perf_counter() - began
    if record.exit_code:
        raise RuntimeError(f"true ended with {record}")
    return took


def theirs(host: Host, bundle: Path) -> float:
    """The container's init is ours to wait for, as it is the supervisor's there: a subreaper's child."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    pid_file = bundle / "pid"
    began = time.perf_counter()
    quiet([*host.runc, "create", "--bundle", str(bundle), "--pid-file", str(pid_file), "life"])
    quiet([*host.runc, "start", "life"])
    os.waitpid(int(pid_file.read_text()), 0)
    quiet([*host.runc, "delete", "life"])
    return time.perf_counter() - began


async def same_bundle(host: Host) -> Path:
    """What the agent gives to runc, as a bundle of its own."""
    ident = "model"
    await host.client.create_container(creation(host.target, ident, ("true",), overlay=False))
    made = host.agent.state_dir / "containers" / ident / "config.json"
    config: dict[str, Any] = json.loads(made.read_text())
    await host.client.delete_container(ident, force=True)
    config["linux"]["cgroupsPath"] += "-bare"
    return await asyncio.to_thread(_write, host.program.parent.parent / "bundle", config)


def _write(bundle: Path, config: dict[str, Any]) -> Path:
    bundle.mkdir(exist_ok=True)
    (bundle / "config.json").write_text(json.dumps(config))
    return bundle
