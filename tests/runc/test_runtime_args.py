"""Extra arguments and --no-pivot: what the runtime is really called with, and that containers still run."""

from __future__ import annotations

import asyncio
import shlex
import shutil
from pathlib import Path

from tests.cases.agents import RunningAgent, stopped_clean
from tests.cases.target import OUTPUT, Target, connect, run, running

WRAPPER = '#!/bin/sh\nprintf "%s\\n" "$*" >>{log}\nexec {runc} "$@"\n'


def test_arguments_reach_every_call_and_no_pivot_every_create(tmp_path: Path, rootfs: str) -> None:
    runc, log = shutil.which("runc"), tmp_path / "calls"
    assert runc is not None
    wrapper = tmp_path / "runc"
    wrapper.write_text(WRAPPER.format(log=shlex.quote(str(log)), runc=shlex.quote(runc)))
    wrapper.chmod(0o755)
    options = (
        "--runtime",
        str(wrapper),
        "--runtime-arg=--debug",
        "--runtime-arg=--criu=/opt/c",
        "--no-pivot",
    )
    for agent in stopped_clean(RunningAgent(*options)):
        target = Target(agent.address, rootfs, box="", pace=1.0, execs=1)

        async def body(target: Target = target) -> None:
            async with await connect(target) as client, running(target, client, stdio=OUTPUT) as init:
                done = await run(client, init.container, "cat", "/etc/hostname")
                assert (done.stdout, done.stderr) == (b"demo\n", b"")

        asyncio.run(body())
    calls = log.read_text().splitlines()
    assert {"create", "start", "exec", "delete"} <= {call.split()[8] for call in calls}, calls
    for call in calls:
        if "--log" in call.split():
            assert call.split()[6:8] == ["--debug", "--criu=/opt/c"], call
            assert ("--no-pivot" in call.split()) is (call.split()[8] == "create"), call
