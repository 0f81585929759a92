"""The part of the method table that is ``guest.*``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gcsagent.agent.guest.clock import ClockService
from gcsagent.agent.guest.entropy import EntropyService
from gcsagent.agent.guest.pressure_service import PressureService
from gcsagent.agent.guest.resources import ResourceService
from gcsagent.agent.registry import Registry


def handlers(registry: Registry) -> dict[str, Callable[..., Any]]:
    clock, entropy = ClockService(registry.guest), EntropyService(registry.guest)
    resources, pressure = ResourceService(registry), PressureService(registry)
    snapshots = registry.snapshots.get()
    return {
        "guest.time": clock.time,
        "guest.set_time": clock.set_time,
        "guest.entropy": entropy.entropy,
        "guest.add_entropy": entropy.add,
        "guest.resources": resources.resources,
        "guest.online": resources.online,
        "guest.watch_pressure": pressure.watch,
        "guest.unwatch_pressure": pressure.unwatch,
        "guest.snapshot_prepare": snapshots.prepare,
        "guest.snapshot_resume": snapshots.resume,
    }
