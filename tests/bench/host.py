"""The host tier's world: the agent on this machine over a UNIX socket, and runc on the same container."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gcsagent.host.client import Client
from gcsagent.host.vm.tools import cache_dir
from tests.cases.agents import RunningAgent
from tests.cases.target import Target, connect, creation, remove

BOX = "box"
PROGRAM = "/bench/bytes"
"""tests/bench/bytes.c, where the box sees it."""


@dataclass(frozen=True, slots=True)
class Host:
    """``program`` is bytes.c, compiled; ``runc`` the start of a command line that finds our containers."""

    agent: RunningAgent
    target: Target
    client: Client
    program: Path
    runc: tuple[str, ...]

    def bare_exec(self, *args: str) -> list[str]:
        return [*self.runc, "exec", BOX, *args]


def compile_program(directory: Path) -> Path:
    """Statically, so that it runs wherever it is put. Raises RuntimeError with the compiler's words."""
    program = directory / "bytes"
    source = Path(__file__).with_name("bytes.c")
    done = subprocess.run(
        ["cc", "-O2", "-static", "-o", program, source], capture_output=True, text=True, timeout=60
    )
    if done.returncode:
        raise RuntimeError(f"bytes.c does not compile: {done.stderr.strip()}")
    return program


def demo_rootfs() -> Path:
    """Raises FileNotFoundError."""
    return (cache_dir() / "demo-rootfs" / "current" / "rootfs").resolve(strict=True)


@contextlib.asynccontextmanager
async def world(directory: Path) -> AsyncIterator[Host]:
    """With a container that runs all the while; nothing of it is left behind."""
    (directory / "bench").mkdir()
    program = compile_program(directory / "bench")
    rootfs = str(demo_rootfs())
    async with running_agent() as agent:
        target = Target(agent.address, rootfs, box=BOX, pace=5.0, execs=1)
        async with await connect(target) as client:
            await client.create_container(
                creation(target, BOX, ("sleep", "100000"), spec=lambda spec: _mount(spec, program.parent))
            )
            await client.start_container(BOX)
            runc = ("runc", "--root", str(agent.state_dir / "runtime" / "runc"))
            yield Host(agent, target, client, program, runc)
            await remove(client, BOX)


def _mount(spec: dict, directory: Path) -> None:  # type: ignore[type-arg]
    spec["mounts"].append(
        {"destination": "/bench", "source": str(directory), "type": "bind", "options": ["bind", "ro"]}
    )


@contextlib.asynccontextmanager
async def running_agent(*options: str) -> AsyncIterator[RunningAgent]:
    """As users run it, but for ``options``; it ends in order, and is seen to leave nothing."""
    agent = await asyncio.to_thread(RunningAgent, *options)
    try:
        yield agent
        if await asyncio.to_thread(agent.stop) != 0:
            raise RuntimeError(f"the agent did not end in order: {agent.log_tail()}")
        if left := agent.leftovers():
            raise RuntimeError(f"the agent left {left}")
    finally:
        agent.destroy()


def bare(argv: Sequence[str]) -> float:
    """Seconds a command takes whose output goes to a pipe that is read to its end.

    posix_spawn, and nothing of the subprocess module: the baseline is the program's cost, not Python's.
    """
    began = time.perf_counter()
    finish(start(argv))
    return time.perf_counter() - began


def quiet(argv: Sequence[str]) -> None:
    """Runs a command without output: a container's init keeps runc's, and a pipe would not end with runc."""
    null = [(os.POSIX_SPAWN_OPEN, fd, "/dev/null", os.O_RDWR, 0) for fd in (0, 1, 2)]
    pid = os.posix_spawnp(argv[0], list(argv), os.environ, file_actions=null)
    if status := os.waitpid(pid, 0)[1]:
        raise RuntimeError(f"{' '.join(argv)}: status {status}")


def start(argv: Sequence[str]) -> tuple[int, int]:
    """Its pid and the pipe of its output."""
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
        (os.POSIX_SPAWN_DUP2, write_end, 1),
        (os.POSIX_SPAWN_DUP2, write_end, 2),
    ]
    try:
        return os.posix_spawnp(argv[0], list(argv), os.environ, file_actions=actions), read_end
    finally:
        os.close(write_end)


def finish(started: tuple[int, int]) -> None:
    """Raises RuntimeError with what it said when it has failed."""
    pid, output = started
    said = b""
    while data := os.read(output, 65536):
        said += data
    os.close(output)
    _, status = os.waitpid(pid, 0)
    if status:
        raise RuntimeError(f"status {status}: {said.decode(errors='replace')[-400:]}")
