"""The part of the method table that is ``guest.*``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gcsagent.agent.guest.clock import ClockService
from gcsagent.agent.guest.entropy import EntropyService
from gcsagent.agent.registry import Registry


def handlers(registry: Registry) -> dict[str, Callable[..., Any]]:
    clock, entropy = ClockService(registry.guest), EntropyService(registry.guest)
    return {
        "guest.time": clock.time,
        "guest.set_time": clock.set_time,
        "guest.entropy": entropy.entropy,
        "guest.add_entropy": entropy.add,
    }
