"""A limit on a disk holds: what is read in a second, by the container's clock and by the kernel's count."""

from __future__ import annotations

from typing import Any

import pytest

from protocol.usage import IoLimit
from tests.cases.limits import DISK
from tests.cases.machines import Booted
from tests.cases.target import MIB, OUTPUT, PIPES, Target, connect, expect, running

pytestmark = pytest.mark.timeout(1300)
ROOTFS = "/run/gcs/disks/rootfs"
PIECE, PIECES = 128 << 10, 32

READ = f"""
import mmap, os, time
disk = os.open("/dev/disk", os.O_RDONLY | os.O_DIRECT)
piece = mmap.mmap(-1, {PIECE})
print("ready", flush=True)
while True:
    input()
    began = time.monotonic()
    for number in range({PIECES}):
        assert os.preadv(disk, [piece], number * {PIECE}) == {PIECE}
    print("took", time.monotonic() - began, flush=True)
"""


async def _limited(target: Target) -> None:
    async with await connect(target) as client:
        async with running(target, client, "sh", "-c", DISK, stdio=OUTPUT) as init:
            number = (await init.communicate()).stdout.split()[0].decode()
        major, minor = (int(part) for part in number.split(":"))

        def with_disk(spec: dict[str, Any]) -> None:
            node = {"type": "b", "major": major, "minor": minor}
            spec["linux"].setdefault("devices", []).append({"path": "/dev/disk", **node})
            allowed = spec["linux"].setdefault("resources", {}).setdefault("devices", [])
            allowed.append({"allow": True, "access": "r", **node})

        async with running(target, client, "python3", "-c", READ, stdio=PIPES, spec=with_disk) as init:
            where, out = init.container, init.streams["stdout"]
            await expect(out, b"ready\n")
            await client.update_container(where, io=[IoLimit(number, read_bps=MIB)])
            before = (await client.container_stats(where)).io.read_bytes or 0
            await init.streams["stdin"].write(b"go\n")
            took = float((await expect(out, b"took .*\n")).split()[1])
            found = (await client.container_stats(where)).io
            assert found.limits == (IoLimit(number, read_bps=MIB),)
            assert (found.read_bytes or 0) - before >= PIECE * PIECES
            [device] = [each for each in found.devices if each.device == number]
            assert device.reads >= PIECES
            assert took >= PIECE * PIECES / MIB / 2, "4 MiB at 1 MiB a second, the first half may be a burst"


def test_a_limit_on_a_disk_holds(vm: Booted) -> None:
    target = Target(vm.machine.address, ROOTFS, box="", pace=vm.pace, execs=1)
    vm.runner.run(_limited(target))
