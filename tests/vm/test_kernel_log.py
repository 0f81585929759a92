"""What the guest's kernel says, on the host: read with gcsctl, and followed while it is said."""

from __future__ import annotations

import asyncio
import json
import secrets
import sys

import pytest

from gcsagent.host.agentlog import AgentLog
from gcsagent.host.client import Client
from protocol.families.diagnostics import LogEntry, LogSource
from tests.cases.agents import REPO
from tests.cases.machines import Booted
from tests.vm.test_guest import ROOTFS

# The first test boots the VM, and may build its image.
pytestmark = pytest.mark.timeout(1300)
SECONDS = 120.0


async def gcsctl(address: str, *words: str) -> tuple[int | None, str]:
    """Exit code and standard output."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gcsagent.host", "--address", address, *words),
        cwd=REPO,
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate()
    return process.returncode, out.decode()


async def said(log: AgentLog, words: str) -> LogEntry:
    async for entry in log.entries(follow=True):
        if words in entry.message:
            return entry
    raise AssertionError("it is followed for ever")


def test_what_the_kernel_says_comes_to_the_host(vm: Booted) -> None:
    async def scene(address: str) -> None:
        mark = f"gcs-test-{secrets.token_hex(8)}"
        root = ("--rm", "--overlay", "--rootfs", ROOTFS)
        async with asyncio.timeout(SECONDS), await Client.connect(address) as client:
            log = AgentLog(client, LogSource.KERNEL)
            log.after = await log.last()
            following = asyncio.create_task(said(log, mark))
            # From user space it has the facility `user`, as the kernel sees to.
            script = ("sh", "-c", f"echo '<4>{mark}' > /dev/kmsg")
            assert await gcsctl(address, "run", *root, "--device", "/dev/kmsg", "--", *script) == (0, "")
            entry = await following
            assert (entry.message, entry.level, entry.name) == (mark, "warning", "facility 1")

            following = asyncio.create_task(said(log, "Killed process"))
            code, _ = await gcsctl(address, "run", *root, "--memory", "16M", "--", "tail", "/dev/zero")
            killed = await following
            assert (code, killed.level, killed.name) == (137, "error", "kernel")
            assert "(tail)" in killed.message

            code, shown = await gcsctl(address, "agent-logs", "--kernel", "--json")
            told = [json.loads(line) for line in shown.splitlines()]
            assert {entry.seq, killed.seq} <= {each["seq"] for each in told}
            code, shown = await gcsctl(address, "agent-logs", "--kernel", "--tail", "200")
            assert [line.endswith(f"WARNING facility 1: {mark}") for line in shown.splitlines()].count(
                True
            ) == 1

    vm.runner.run(scene(vm.machine.address))
