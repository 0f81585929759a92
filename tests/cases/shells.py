"""The debug shell on this machine, and the few moves that its tests are made of."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gcsagent.host.client import Client
from gcsagent.host.dialogue import Dialogue, answer
from gcsagent.host.shell import Shell, listing
from gcsagent.host.streams import Stream
from gcsagent.host.transport import dial
from protocol.address import UnixAddress
from protocol.families.shell import OpenShell, ShellExit, ShellRef
from protocol.framing import Response
from tests.cases.agents import RunningAgent, children
from tests.cases.target import Target, creation, expect, remove

SLEEP = ("sleep", "100000")
IDLE_FDS = 8
"""0 to 2, an epoll, the listening socket, the channel, both ends of a pipe that signals wake it by."""
SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Shelled:
    """An agent with a debug shell, and a container ``box`` in it."""

    agent: RunningAgent
    address: UnixAddress
    target: Target

    @property
    def server(self) -> int:
        """The serving process; 0: there is none."""
        return next((pid for pid in children(self.agent.pid) if b"gcsagent.shell" in command_of(pid)), 0)

    def holdings(self) -> tuple[int, list[int]]:
        """Descriptors and children of the serving process."""
        return len(os.listdir(f"/proc/{self.server}/fd")), children(self.server)

    def run(self, scene: Callable[[], Awaitable[object]]) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(SECONDS):
                await scene()

        asyncio.run(bounded())

    async def clear(self) -> None:
        async with await Client.connect(self.target.address) as client:
            await remove(client, self.target.box)

    async def open(self, *argv: str, container: str | None = None, **more: Any) -> Shell:
        return await Shell.open(self.address, OpenShell(container, argv, **more), client_name="tests")

    async def raw(self, *requests: tuple[str, dict[str, Any]]) -> Any:
        """The first answer to requests that our own client would not send."""
        dialogue = Dialogue(await dial(self.address))
        try:
            await dialogue.hello("raw")
            frames = [dialogue.connection.request(10 + n, *each) for n, each in enumerate(requests)]
            await asyncio.get_running_loop().sock_sendall(dialogue.sock, b"".join(frames))
            message = await dialogue.message()
            assert isinstance(message, Response)
            return answer(message)
        finally:
            dialogue.close()


def command_of(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def is_gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


async def start(target: Target, ident: str, *args: str, **more: Any) -> int:
    async with await Client.connect(target.address) as client:
        await client.create_container(creation(target, ident, args, **more))
        await client.start_container(ident)
        return (await client.container_state(ident)).pid


@contextlib.asynccontextmanager
async def container(shelled: Shelled, ident: str, *args: str, **more: Any) -> AsyncIterator[int]:
    try:
        yield await start(shelled.target, ident, *(args or SLEEP), **more)
    finally:
        async with await Client.connect(shelled.target.address) as client:
            await remove(client, ident)


@contextlib.contextmanager
def stopped(agent: RunningAgent) -> Iterator[None]:
    pid = agent.agent_pid
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


async def output_of(shell: Shell) -> tuple[bytes, ShellExit]:
    """What it still writes, all of it, and how it ended."""
    waiting = asyncio.create_task(shell.wait())
    collected = bytearray()
    while data := await shell.stream.read():
        collected += data
    record = await waiting
    shell.stream.check_complete()
    return bytes(collected), record


async def expect_line(stream: Stream, pattern: bytes, seen: bytearray) -> bytes:
    """Reads until a whole line is ``pattern``; ``seen`` has what came behind it, for the next one."""
    return (await expect(stream, rb"(?:\A|\n)" + pattern + rb"\r\n", seen)).strip()


async def ended(client: Client) -> None:
    """Until every shell there is now has ended."""
    for shell in (await listing(client)).shells:
        await client.call("shell.wait", ShellRef(shell.shell))
