"""The cases in one VM, over vsock: those of the list that a kernel or vsock has a part in."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cases.machines import Booted
from tests.cases.spine import VM_NAMES, check, close_box, open_box
from tests.cases.target import Target

# The first test boots the VM, and may build its image.
pytestmark = pytest.mark.timeout(1300)
ROOTFS = "/run/gcs/disks/rootfs"
SECONDS = 10.0
"""What a case may take, on bare metal."""


@pytest.fixture(scope="module")
def target(vm: Booted) -> Iterator[Target]:
    execs = 30 if vm.machine.accel.name == "kvm" else 6
    target = Target(vm.machine.address, ROOTFS, box="box", pace=vm.pace, execs=execs)
    vm.runner.run(open_box(target))
    yield target
    vm.runner.run(close_box(target))


@pytest.mark.parametrize("name", VM_NAMES)
def test_case(vm: Booted, target: Target, name: str) -> None:
    vm.runner.run(check(target, name, SECONDS * vm.pace))
