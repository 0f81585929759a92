"""A VM that tests share."""

from __future__ import annotations

import asyncio
import subprocess
from dataclasses import dataclass
from pathlib import Path

from gcsagent.host.vm.launcher import VirtualMachine
from tests.cases.agents import REPO

BUILD_SECONDS = 900.0
PACE = {"kvm": 2.0, "tcg": 20.0}
"""How many times slower than bare metal things may be."""


@dataclass(frozen=True, slots=True)
class Booted:
    """The VM, and the event loop that looks after it: tests run theirs in it, too."""

    machine: VirtualMachine
    runner: asyncio.Runner

    @property
    def pace(self) -> float:
        return PACE[self.machine.accel.name]


def build_image(*options: str) -> Path:
    """The guest image of this tree, built if the cache lacks it. Raises CalledProcessError."""
    argv = [str(REPO / "scripts/build-rootfs.sh"), *options]
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, timeout=BUILD_SECONDS, check=True)
    return Path(done.stdout.strip())
