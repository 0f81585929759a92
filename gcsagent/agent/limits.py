"""container.update: other limits for a container that is there."""

from __future__ import annotations

from typing import Any

from gcsagent.agent.call import Call
from gcsagent.agent.registry import Registry
from protocol.errors import Code, RpcError
from protocol.families.container import UpdateContainer
from protocol.method import Empty

PERIOD_US = 100_000
"""The kernel's default period for CPU limits (sched-bwc.rst); the quota is the part of it that is allowed."""


class LimitService:
    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def update(self, params: UpdateContainer, call: Call) -> Empty:
        """What is wrong with the limits is said before the runtime is asked."""
        container = self._registry.get(params.container)
        container.check("update")
        wanted = resources(params)
        if not wanted:
            raise RpcError(
                Code.INVALID_ARGUMENT,
                "nothing to update: give memory_bytes, cpus or pids",
                field="memory_bytes",
            )
        await container.runtime.update(container.ident, wanted, call.timeout)
        call.commit()
        return Empty()


def resources(params: UpdateContainer) -> dict[str, Any]:
    """The limits as ``linux.resources`` of the OCI runtime spec."""
    wanted: dict[str, Any] = {}
    if params.memory_bytes is not None:
        wanted["memory"] = {"limit": params.memory_bytes}
    if params.cpus is not None:
        wanted["cpu"] = {"period": PERIOD_US, "quota": round(params.cpus * PERIOD_US)}
    if params.pids is not None:
        wanted["pids"] = {"limit": params.pids}
    return wanted
