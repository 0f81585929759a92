"""gcsctl for tests, as a user meets it: a real process against a scripted agent."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protocol.errors import Code, RpcError
from tests.fakes.fake_agent import FakeAgent

SECONDS = 20.0
MORE = "`gcsctl agent-logs --tail 20` has more"


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


@contextlib.asynccontextmanager
async def running(
    agent: FakeAgent | None, *argv: str, **popen: Any
) -> AsyncIterator[asyncio.subprocess.Process]:
    """gcsctl with ``argv``, killed if the test leaves it behind."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GCS_")}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    environment |= {"GCS_ADDRESS": agent.address} if agent is not None else {}
    pipe = asyncio.subprocess.PIPE
    streams = {"stdin": subprocess.DEVNULL, "stdout": pipe, "stderr": pipe, **popen}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gcsagent.host", *argv, env=environment, **streams
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def gcsctl(agent: FakeAgent | None, *argv: str, data: bytes | None = None) -> Done:
    popen = {} if data is None else {"stdin": subprocess.PIPE}
    async with asyncio.timeout(SECONDS), running(agent, *argv, **popen) as process:
        out, err = await process.communicate(data)
        assert process.returncode is not None
        return Done(process.returncode, out.decode(), err.decode())


def with_agent(tmp_path: Path, body: Callable[[FakeAgent], Awaitable[None]]) -> None:
    async def scenario() -> None:
        async with FakeAgent(tmp_path / "gcs.sock") as agent:
            await body(agent)

    asyncio.run(scenario())


def refusing(code: Code, message: str, **details: Any) -> Callable[[Any], Any]:
    def refuse(params: Any) -> Any:
        raise RpcError(code, message, **details)

    return refuse


async def until(condition: Callable[[], object]) -> None:
    """Polls: what is waited for happens in another process."""
    async with asyncio.timeout(SECONDS):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
