"""The client in C, over hybrid vsock: one line to the VMM's socket, and then what it says anywhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cases.machines import Booted
from tests.foreign.build import build, ran_a_container

# The first test boots the VM, and may build its image.
pytestmark = pytest.mark.timeout(1300)
ROOTFS = "/run/gcs/disks/rootfs"


def test_a_client_in_c_runs_a_container(vm: Booted, tmp_path: Path) -> None:
    ran_a_container(build(tmp_path), vm.machine.address, ROOTFS, seconds=60 * vm.pace)
