"""The requests about pressure: which file of the kernel a watch is on."""

from __future__ import annotations

from gcsagent.agent.call import Call
from gcsagent.agent.guest.pressure import MACHINE
from gcsagent.agent.registry import Registry
from protocol.errors import Code, RpcError
from protocol.families.guest import PressureRef, WatchPressure
from protocol.method import Empty


class PressureService:
    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def watch(self, params: WatchPressure, call: Call) -> Empty:
        self._registry.pressure.get().begin(params, self._file(params))
        call.commit()
        return Empty()

    def unwatch(self, params: PressureRef, call: Call) -> Empty:
        self._registry.pressure.get().end(params.watch)
        call.commit()
        return Empty()

    def _file(self, params: WatchPressure) -> str:
        if params.container is None:
            return f"{MACHINE}/{params.resource.value}"
        path = self._registry.get(params.container).cgroup.file(f"{params.resource.value}.pressure")
        if path is None:
            raise RpcError(
                Code.UNIMPLEMENTED,
                f"the cgroup of {params.container} has no {params.resource.value}.pressure: it has that with"
                " a process in it, and under cgroup v2",
            )
        return path
