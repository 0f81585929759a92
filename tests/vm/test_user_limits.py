"""What the kernel counts per user, where the user of agent and containers is the same: root."""

from __future__ import annotations

import pytest

from tests.cases.machines import Booted
from tests.cases.target import OUTPUT, Target, connect, executing, expect, run, running

pytestmark = pytest.mark.timeout(1300)
ROOTFS = "/run/gcs/disks/rootfs"

GREED = """
import os, select, time
watched, each = [os.eventfd(0) for _ in range(505)], []
try:
    for _ in range(505):
        each.append(select.epoll())
        for fd in watched:
            each[-1].register(fd, select.EPOLLIN)
    print("all of it", flush=True)
except OSError as error:
    print(error, flush=True)
time.sleep(100000)
"""
"""255,025 watches, with a thousand descriptors: more than the kernel allows one user here, by itself."""


async def _scene(target: Target) -> None:
    async with (
        await connect(target) as client,
        running(target, client, stdio=OUTPUT) as box,
        executing(client, box.container, "python3", "-I", "-S", "-c", GREED) as greedy,
    ):
        assert await expect(greedy.streams["stdout"], rb".*\n") == b"all of it\n"
        async with await connect(target) as other:
            done = await run(other, box.container, "echo", "still here")
            assert (done.stdout, done.exit.exit_code) == (b"still here\n", 0)


def test_a_container_cannot_use_up_what_the_agent_may_watch(vm: Booted) -> None:
    target = Target(vm.machine.address, ROOTFS, box="", pace=vm.pace, execs=1)
    vm.runner.run(_scene(target))
