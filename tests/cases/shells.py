"""The few moves that tests of the debug shell are made of."""

from __future__ import annotations

import asyncio

from gcsagent.host.client import Client
from gcsagent.host.shell import Shell, listing
from gcsagent.host.streams import Stream
from protocol.families.shell import ShellExit, ShellRef
from tests.cases.target import expect


async def output_of(shell: Shell) -> tuple[bytes, ShellExit]:
    """What it still writes, all of it, and how it ended."""
    waiting = asyncio.create_task(shell.wait())
    collected = bytearray()
    while data := await shell.stream.read():
        collected += data
    record = await waiting
    shell.stream.check_complete()
    return bytes(collected), record


async def expect_line(stream: Stream, pattern: bytes) -> bytes:
    """Reads until a whole line is ``pattern``; what came before it, and behind it so far, is dropped."""
    return (await expect(stream, rb"(?:\A|\n)" + pattern + rb"\r\n")).strip()


async def ended(client: Client) -> None:
    """Until every shell there is now has ended."""
    for shell in (await listing(client)).shells:
        await client.call("shell.wait", ShellRef(shell.shell))
