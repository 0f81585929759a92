"""Pids that come round again: the guest is given few of them, and nothing is taken for something else."""

from __future__ import annotations

from typing import Any

import pytest

from gcsagent.host.client import Client
from tests.cases.machines import Booted
from tests.cases.target import OUTPUT, Target, connect, executing, running

pytestmark = pytest.mark.timeout(1300)
ROOTFS = "/run/gcs/disks/rootfs"
PID_MAX = 600
"""Not far above what the kernel's own threads take; 301 is the least it allows."""

ROUND = """
import os
seen = set()
while True:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    if pid in seen:
        break
    seen.add(pid)
print(len(seen))
"""


def _may_set_sysctls(spec: dict[str, Any]) -> None:
    """Shares the guest's pids, and may write /proc/sys."""
    spec["linux"]["namespaces"] = [each for each in spec["linux"]["namespaces"] if each["type"] != "pid"]
    spec["linux"]["readonlyPaths"] = []


async def _wrap(target: Target) -> None:
    async with (
        await connect(target) as client,
        running(target, client, "sleep", "100000", stdio=OUTPUT, spec=_may_set_sysctls) as box,
    ):
        before = await _run(client, box.container, "cat /proc/sys/kernel/pid_max")
        await _run(client, box.container, f"echo {PID_MAX} >/proc/sys/kernel/pid_max")
        try:
            await _round_and_round(client, box.container)
        finally:
            await _run(client, box.container, f"echo {before} >/proc/sys/kernel/pid_max")


async def _round_and_round(client: Client, container: str) -> None:
    """Each exec comes behind a whole round of pids; one lives through all of them."""
    async with executing(client, container, "sh", "-c", "exec sleep 100000") as steady:
        pids = [steady.pid]
        for number in range(4):
            async with executing(client, container, "python3", "-I", "-S", "-c", ROUND) as process:
                completed = await process.communicate()
                assert completed.exit.exit_code == 0, completed.stderr
                assert 0 < int(completed.stdout) < PID_MAX
            async with executing(client, container, "sh", "-c", f"exit {40 + number}") as process:
                assert (await process.wait()).exit_code == 40 + number
                pids.append(process.pid)
        assert max(pids) <= max(PID_MAX, steady.pid)
        assert (await client.process_state(container, steady.process)).exit is None
        await steady.kill("KILL")
        assert (await steady.wait()).signal == 9


async def _run(client: Client, container: str, script: str) -> str:
    async with executing(client, container, "sh", "-c", script) as process:
        completed = await process.communicate()
    assert completed.exit.exit_code == 0, completed.stderr
    return completed.stdout.decode().strip()


def test_pids_that_come_round_again(vm: Booted) -> None:
    target = Target(vm.machine.address, ROOTFS, box="", pace=vm.pace, execs=1)
    vm.runner.run(_wrap(target))
