"""The guest as a machine: its clock against the host's, what its random numbers are made of."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from typing import Any

import pytest

from gcsagent.host import clock
from gcsagent.host.client import Client
from gcsagent.host.vm.launcher import VirtualMachine
from protocol.errors import Code, RpcError
from protocol.families.guest import AddEntropy, ClockChange, Entropy, SetTime
from protocol.method import Empty
from tests.cases.machines import Booted
from tests.cases.target import Target, connect, run, running

# The first test boots the VM, and may build its image.
pytestmark = pytest.mark.timeout(1300)
ROOTFS = "/run/gcs/disks/rootfs"
SECOND = 10**9
PAUSE = 2.0
SLEW = 40_000_000


async def gcsctl(address: str, *words: str) -> Any:
    """What ``gcsctl --json`` prints."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gcsagent.host", "--address", address, "--json", *words),
        env=environment,
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0
    return json.loads(out)


async def _pause(machine: VirtualMachine) -> float:
    """Seconds for which the guest certainly stood still."""
    await machine.pause()
    begun = time.monotonic()
    await asyncio.sleep(PAUSE)
    stood = time.monotonic() - begun
    await machine.resume()
    return stood


async def _look_after_the_clock(machine: VirtualMachine, target: Target) -> None:
    async with await connect(target) as client:
        done = await clock.sync(client)
        assert abs(done.after.offset_ns) <= 2 * done.after.error_ns + 5_000_000
        assert done.after.error_ns < SECOND
        stood = await _pause(machine)
        late = await clock.measure(client)
        print(f"after a pause of {stood:.3f} s: {late}")
        assert late.offset_ns < -(stood - 0.5) * SECOND
        repaired = await gcsctl(target.address, "clock", "--set", "step")
        assert repaired["before"]["offset_ns"] < -(stood - 0.5) * SECOND
        print(f"repaired: {repaired['after']}")
        assert abs(repaired["after"]["offset_ns"]) <= 2 * repaired["after"]["error_ns"] + 5_000_000
        await _slew(client)
        async with running(target, client) as box:
            await client.call("guest.set_time", SetTime(time_ns=86_400 * 365 * SECOND))
            shown = await run(client, box.container, "date", "-u", "+%Y")
            assert shown.stdout == b"1971\n"
        with pytest.raises(RpcError) as caught:
            await client.call("guest.set_time", SetTime(time_ns=(1 << 63) - 1))
        assert (caught.value.code, caught.value.details["field"]) == (Code.INVALID_ARGUMENT, "time_ns")
        back = await clock.sync(client)
        assert abs(back.after.offset_ns) <= 2 * back.after.error_ns + 5_000_000


async def _slew(client: Client) -> None:
    """The kernel takes it off bit by bit; a step ends it."""
    await client.call("guest.set_time", SetTime(offset_ns=-SLEW, how=ClockChange.SLEW))
    left = (await clock.measure(client, 1)).slewing_ns
    async with asyncio.timeout(30):
        while left <= -SLEW:
            left = (await clock.measure(client, 1)).slewing_ns
    assert -SLEW < left < 0
    await client.call("guest.set_time", SetTime(offset_ns=0))
    assert (await clock.measure(client, 1)).slewing_ns == 0


async def _feed(target: Target) -> None:
    async with await connect(target) as client:
        found: Entropy = await client.call("guest.entropy", Empty())
        assert (found.available_bits, found.pool_bits, found.source) == (256, 256, "virtio_rng.0")
        assert (await gcsctl(target.address, "entropy", "--add", "4096"))["available_bits"] == 256
        for wrong, field in (
            (AddEntropy(b""), "data"),
            (AddEntropy(bytes(4097)), "data"),
            (AddEntropy(b"x", bits=9), "bits"),
        ):
            with pytest.raises(RpcError) as caught:
                await client.call("guest.add_entropy", wrong)
            assert (caught.value.code, caught.value.details["field"]) == (Code.INVALID_ARGUMENT, field)


def test_the_clock_is_measured_set_and_repaired(vm: Booted) -> None:
    target = Target(vm.machine.address, ROOTFS, box="", pace=vm.pace, execs=1)
    vm.runner.run(_look_after_the_clock(vm.machine, target))


def test_the_generator_is_fed(vm: Booted) -> None:
    vm.runner.run(_feed(Target(vm.machine.address, ROOTFS, box="", pace=vm.pace, execs=1)))
