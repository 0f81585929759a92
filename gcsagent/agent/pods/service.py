"""pod.update and pod.stats."""

from __future__ import annotations

from gcsagent.agent.call import Call
from gcsagent.agent.cgroup_stats import read_stats
from gcsagent.agent.pods import cgroup
from gcsagent.agent.pods.pod import Role
from gcsagent.agent.pods.setup import sandbox_of
from gcsagent.agent.registry import Registry
from protocol.dataclass import replace
from protocol.errors import Code, RpcError
from protocol.families.pod import PodRef, UpdatePod
from protocol.method import Empty
from protocol.usage import ContainerStats


class PodService:
    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def stats(self, params: PodRef, _call: Call) -> ContainerStats:
        sandbox = sandbox_of(self._registry, params.sandbox, "sandbox")
        sandbox.check("read the statistics of the pod of")
        return read_stats(sandbox.ident, sandbox.cgroup.parent())

    def update(self, params: UpdatePod, call: Call) -> Empty:
        """All limits or none: what is written down is what the next agent sees to."""
        sandbox = sandbox_of(self._registry, params.sandbox, "sandbox")
        sandbox.check("update the pod of")
        options = sandbox.role.sandbox
        assert options is not None
        wanted = cgroup.merged(options.limits, params)
        if all(getattr(params, field) is None for field in cgroup.FIELDS):
            raise RpcError(
                Code.INVALID_ARGUMENT,
                f"nothing to update: give {', '.join(cgroup.FIELDS)}",
                field=cgroup.FIELDS[0],
            )
        before = sandbox.role
        cgroup.apply(sandbox.cgroup.parent(), wanted)
        try:
            sandbox.role = Role(sandbox=replace(options, limits=wanted))
            sandbox.save()
        except BaseException:
            sandbox.role = before
            cgroup.apply_again(sandbox.cgroup.parent(), options.limits)
            raise
        call.commit()
        return Empty()
