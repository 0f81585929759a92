"""The part of the method table that is ``network.*``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gcsagent.agent.network.attach import AttachService
from gcsagent.agent.network.service import NetworkService
from gcsagent.agent.registry import Registry


def handlers(registry: Registry) -> dict[str, Callable[..., Any]]:
    network = NetworkService(registry)
    return {
        "network.apply": network.apply,
        "network.attach": AttachService(network).attach,
        "network.state": network.state,
        "network.remove": network.remove,
    }
