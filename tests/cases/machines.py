"""A VM that tests share."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from gcsagent.host.vm.launcher import VirtualMachine

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
