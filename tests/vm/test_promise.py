"""The agent is SIGKILLed inside the VM, with everything under way over vsock: nothing is lost.

Who kills it is a container that shares the guest's pid namespace and is told when by its stdin: a stream
like the others, which has to survive what it causes.
"""

from __future__ import annotations

import os

import pytest

from tests.cases.chaos import Storm, weather_the_storm
from tests.cases.killer import KILLER, kill_once, share_pids
from tests.cases.machines import Booted
from tests.cases.spine import close_box, open_box
from tests.cases.target import MIB, PIPES, Target, connect, running

pytestmark = pytest.mark.timeout(1300)
ROOTFS = "/run/gcs/disks/rootfs"
SHORT = Storm(kills=8, stdout=24 * MIB, stdin=8 * MIB, tty=MIB // 4, spool=4 * MIB, execs=4)
LONG = Storm(kills=40, stdout=128 * MIB, stdin=32 * MIB, tty=2 * MIB, spool=16 * MIB, execs=20)


async def _storm(target: Target, storm: Storm) -> int:
    async with await connect(target) as client:
        supervisor = (await client.info()).supervisor_pid
        command = ("python3", "-I", "-S", "-c", KILLER % supervisor)
        async with running(target, client, *command, stdio=PIPES, spec=share_pids) as killer:

            async def kill() -> None:
                await kill_once(client, killer)

            return (await weather_the_storm(target, storm, kill)).kills


def test_everything_goes_on_while_the_agent_is_killed(vm: Booted) -> None:
    storm = LONG if os.environ.get("GCS_CHAOS") == "long" else SHORT
    target = Target(vm.machine.address, ROOTFS, box="promise", pace=vm.pace, execs=1)
    vm.runner.run(open_box(target))
    try:
        kills = vm.runner.run(_storm(target, storm))
    finally:
        vm.runner.run(close_box(target))
    assert kills == storm.kills
    print(
        f"\nchaos in the VM: {kills} kills of the agent; {storm.stdout >> 20} MiB of stdout,"
        f" {storm.stdin >> 20} MiB of stdin, {storm.tty >> 10} KiB through a raw terminal and back,"
        f" {storm.spool >> 20} MiB through a spool of 1 MiB,"
        f" {storm.execs} execs: every byte once and in order, every exit code right"
    )
