"""Thirty containers in one VM, and what requests take while a stream saturates it.

``make test-long`` is that; without ``GCS_SCALE=long`` there are fewer. Figures are printed.
"""

from __future__ import annotations

import os

import pytest

from tests.cases.machines import Booted
from tests.cases.scale import Size, crowd, disperse, populate, responses, saturated, show
from tests.cases.target import MIB, Target, connect
from tests.vm.test_spine import ROOTFS

pytestmark = pytest.mark.timeout(1300)

SHORT, LONG = Size(4, 4, 1), Size(30, 30, 3)
SIZE = LONG if os.environ.get("GCS_SCALE") == "long" else SHORT
ANSWER_SECONDS = 0.25
"""What an answer may take on bare metal that no runtime is asked for."""


def test_a_crowd(vm: Booted) -> None:
    target = Target(vm.machine.address, ROOTFS, box="", pace=vm.pace, execs=1, runtime="crun")
    vm.runner.run(_crowd(target))


async def _crowd(target: Target) -> None:
    containers = [f"c{number:03}" for number in range(SIZE.containers)]
    async with await connect(target) as client:
        try:
            await crowd(target, client, containers)
            await populate(client, containers, SIZE.execs)
            async with saturated(target, client, containers[1]) as count:
                moved = await count()
                figures = await responses(target, client, containers, SIZE.rounds)
                moved = await count() - moved
            title = (
                f"{SIZE.containers} containers, {SIZE.execs} execs, while a stream moves {moved >> 20} MiB"
            )
            show(title, figures)
            assert moved > MIB
            for quick in (*figures[:4], figures[5], *figures[-2:]):
                assert quick.worst < ANSWER_SECONDS * target.pace, quick
        finally:
            await disperse(client, containers)
        assert await client.list_containers() == ()
