"""An agent whose runc waits at a gate, or fails there: what is under way can be looked at, and cut off."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.cases.agents import RunningAgent, stopped_clean
from tests.cases.target import Target, connect

SLOW = """#!/bin/sh
case " $* " in
*" $(cat "{directory}/slow") "*) [ "$(cat "{directory}/gate")" = pass ] || exit 9;;
esac
exec {runc} "$@"
"""
"""runc, which waits at a gate before it does what is named in ``slow``."""


@dataclass(frozen=True, slots=True)
class Slow:
    running: RunningAgent
    directory: Path
    target: Target

    @contextlib.asynccontextmanager
    async def held(self, *, fail: bool = False) -> AsyncIterator[None]:
        """A call of this kind that the body's caller has made waits until the body is through."""
        gate = await asyncio.to_thread(os.open, self.directory / "gate", os.O_WRONLY)
        (self.directory / "slow").write_text("nothing")
        try:
            yield
        finally:
            os.write(gate, b"fail" if fail else b"pass")
            os.close(gate)

    @contextlib.asynccontextmanager
    async def killed_during(self, *, fail: bool = False) -> AsyncIterator[None]:
        """Likewise, and the agent is killed and another there before the body."""
        async with self.held(fail=fail):
            async with await connect(self.target) as client:
                before = (await client.ping()).generation
            os.kill(self.running.agent_pid, signal.SIGKILL)
            await asyncio.to_thread(self.running.wait_for_generation, before + 1)
            yield


def slow_agent(tmp_path: Path, rootfs: str) -> Iterator[Slow]:
    os.mkfifo(tmp_path / "gate")
    (tmp_path / "slow").write_text("nothing")
    wrapper = tmp_path / "runc"
    wrapper.write_text(SLOW.format(directory=tmp_path, runc=shutil.which("runc")))
    wrapper.chmod(0o755)
    for running in stopped_clean(RunningAgent("--log-level", "debug", "--runtime", str(wrapper))):
        yield Slow(running, tmp_path, Target(running.address, rootfs, box="", pace=2.0, execs=1))
