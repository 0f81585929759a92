"""container.state: what the agent has, and on request what the runtime and the kernel have beside it."""

from __future__ import annotations

from gcsagent.agent.call import Call
from gcsagent.agent.container import Container
from gcsagent.agent.process_list import init_started_at_ns
from gcsagent.agent.registry import Registry
from gcsagent.agent.runtime import RuntimeFailure, RuntimeMissing, RuntimeState
from protocol.dataclass import replace
from protocol.families.container import StateContainer
from protocol.types import ContainerState, Status
from protocol.usage import RuntimeView

SPARE_SECONDS = 2.0
"""Of the call's time kept for its answer: that the runtime hangs is to be said within the deadline."""

MIN_SECONDS = 0.5

_COMPARABLE = (Status.CREATED, Status.RUNNING, Status.PAUSED, Status.STOPPED)


class StateService:
    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def state(self, params: StateContainer, call: Call) -> ContainerState:
        container = self._registry.get(params.container)
        if not params.ask_runtime:
            return container.state()
        before = container.state()
        view, answered = await _ask(container, max(MIN_SECONDS, call.timeout - SPARE_SECONDS))
        now = container.state()
        # What has changed meanwhile is no difference: either answer may have come first.
        settled = answered and (before.status, before.pid) == (now.status, now.pid)
        return replace(now, runtime_view=replace(view, differences=differences(now, view) if settled else ()))


async def _ask(container: Container, timeout: float) -> tuple[RuntimeView, bool]:
    """A runtime that cannot be asked hides nothing of what the agent knows: the view says what is wrong.

    Second comes whether there was an answer, which may be that it knows no such container.
    """
    state, problem, answered = RuntimeState("", 0, "", 0), "", True
    try:
        state = await container.runtime.state(container.ident, timeout)
    except RuntimeFailure as failure:
        problem = failure.runtime_error or str(failure)
        answered = not failure.timed_out and not isinstance(failure, RuntimeMissing)
    started = init_started_at_ns(container)
    view = RuntimeView(state.status, state.pid, state.bundle, state.created_at_ns, started, problem)
    return view, answered


def differences(ours: ContainerState, theirs: RuntimeView) -> tuple[str, ...]:
    """A status that only the agent has (creating, deleting, failed) is compared with nothing."""
    if ours.status not in _COMPARABLE:
        return ()
    if theirs.problem:
        return (f"the agent has it as {ours.status.value}, the runtime does not know it",)
    found = []
    if theirs.status != ours.status.value:
        found.append(f"the agent has it as {ours.status.value}, the runtime as {theirs.status}")
    if ours.status is not Status.STOPPED and theirs.pid != ours.pid:
        found.append(f"the agent has pid {ours.pid} as its init, the runtime {theirs.pid}")
    if theirs.bundle != ours.bundle:
        found.append(f"the agent has its bundle in {ours.bundle}, the runtime in {theirs.bundle}")
    return tuple(found)
