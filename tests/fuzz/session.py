"""The agent's session, dispatcher and services in this process, a supervisor of the tests' behind them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import msgpack

from tests.fuzz import vectors
from tests.fuzz.target import Broken
from tests.unit.test_agent_session import Host

QUIET_SECONDS = 0.02
"""A request that is not answered by then waits for something; its connection is closed."""

ELSEWHERE = ("agent.shutdown", "agent.upgrade", "guest.", "network.", "storage.", "agent.stacks", "archive.")
"""Asked of a live agent instead: they reach beyond this process."""


class _Tracebacks(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.seen: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.seen.append(record)


class AgentSession:
    name, coverage = "session", True

    def open(self, directory: Path) -> None:
        self._loop = asyncio.new_event_loop()
        self._tracebacks = _Tracebacks()
        self._strays: list[dict[str, Any]] = []
        root = logging.getLogger()
        root.handlers[:] = [self._tracebacks]
        self._loop.set_exception_handler(lambda _loop, context: self._strays.append(context))
        self._host = self._loop.run_until_complete(self._make(directory))

    async def _make(self, directory: Path) -> Host:
        (directory / "host").mkdir()
        return Host(directory / "host")

    def close(self) -> None:
        async def close() -> None:
            self._host.session, self._host.sock = self._host.connect()  # the first was given up long ago
            await self._host.close()

        self._loop.run_until_complete(close())
        self._loop.close()

    def seeds(self) -> list[bytes]:
        calm = [
            msgpack.packb([0, number, method, [params]])
            for number, (method, params) in enumerate(vectors.requests().items(), 1)
            if not method.startswith(ELSEWHERE)
        ]
        return [vectors.HELLO + each for each in calm] + vectors.frames("notifications", "faults")

    def execute(self, data: bytes) -> Hashable:
        if any(word.encode() in data for word in ELSEWHERE):
            return None
        answers = self._loop.run_until_complete(self._converse(data))
        if self._strays:
            context = self._strays.pop()
            raise context.get("exception") or Broken(context["message"])
        if self._tracebacks.seen:
            record = self._tracebacks.seen.pop()
            assert record.exc_info is not None
            raise record.exc_info[1] or Broken(record.getMessage())
        return tuple(_sketch(answer) for answer in answers)

    async def _converse(self, data: bytes) -> list[Any]:
        host, loop = self._host, asyncio.get_running_loop()
        closed = len(host.closed)
        session, sock = host.connect()
        with sock:
            sending = asyncio.ensure_future(loop.sock_sendall(sock, data))
            unpacker = msgpack.Unpacker(raw=False, max_buffer_size=1 << 26)
            with contextlib.suppress(TimeoutError, OSError):
                while True:
                    async with asyncio.timeout(QUIET_SECONDS):
                        got = await loop.sock_recv(sock, 1 << 16)
                    if not got:
                        break
                    unpacker.feed(got)
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
        answers = list(unpacker)
        async with asyncio.timeout(5):
            while session not in host.closed and len(host.closed) == closed:  # noqa: ASYNC110 - in this loop
                await asyncio.sleep(0)
        host.closed.clear()
        host.welcomed.clear()
        host.supervisor.requests.clear()
        return answers


def _sketch(answer: Any) -> Hashable:
    if isinstance(answer, list) and len(answer) == 4 and isinstance(answer[2], dict):
        error = answer[2]
        if error.get("code") == "INTERNAL":
            raise Broken(f"INTERNAL: {error.get('message')}")
        return error.get("code"), str(error.get("details", {}).get("field"))
    if isinstance(answer, list) and len(answer) == 3 and answer[1] == "rpc.error":
        return "fault", answer[2][0].get("kind")
    return len(answer) if isinstance(answer, list) else -1
