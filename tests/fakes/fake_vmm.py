"""A VMM's vsock socket: leads to an agent's once its script is at an end.

The script has an answer to CONNECT for each connection in turn: bytes, after which it closes, or None, which
leaves CONNECT unanswered until the client goes, and then answers.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.fakes.fake_agent import raw_server

Answer = bytes | None

WRONG, CLOSED, HALF, LATE = b"NO 1024\n", b"", b"OK 10", None


class FakeVmm:
    """``ports`` has what was asked for, connection by connection."""

    def __init__(self, path: Path, agent: Path, script: Sequence[Answer] = ()) -> None:
        self.script = list(script)
        self.ports: list[int] = []
        self._path, self._agent = path, agent
        self._stack = contextlib.AsyncExitStack()

    def address(self, port: int = 1024) -> str:
        return f"hvsock:{self._path}:{port}"

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(raw_server(self._path, self._serve))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        word, _, port = (await reader.readline()).partition(b" ")
        assert word == b"CONNECT"
        self.ports.append(int(port))
        if not self.script:
            writer.write(b"OK 1073741824\n")
            await self._splice(reader, writer)
            return
        answer = self.script.pop(0)
        if answer is LATE:
            await reader.read()
        writer.write(b"OK 1073741824\n" if answer is None else answer)
        await writer.drain()

    async def _splice(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner, outer = await asyncio.open_unix_connection(self._agent)
        ways = [asyncio.create_task(_copy(reader, outer)), asyncio.create_task(_copy(inner, writer))]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            outer.close()  # before anything that the end of the fake could cancel
            await asyncio.gather(*ways, return_exceptions=True)


async def _copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    while data := await source.read(65536):
        sink.write(data)
        await sink.drain()
