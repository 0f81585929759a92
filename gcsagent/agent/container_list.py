"""container.list: pages that fit a message, and that do not hold up the agent's event loop for long.

What a container takes on the wire is estimated, from above: to encode it twice would cost what the page
is to save.
"""

from __future__ import annotations

from gcsagent.agent.call import Call
from gcsagent.agent.container import Container
from gcsagent.agent.registry import Registry
from protocol.families.container import ContainerList, ListContainers
from protocol.limits import MAX_FRAME
from protocol.types import ContainerState

ROOM = MAX_FRAME * 3 // 4
"""Bytes of containers in one answer; with what the estimate may be off, it stays below MAX_FRAME."""

_CONTAINER, _PROCESS, _VICTIM = 1280, 1280, 256
"""Bytes of records whose ids, numbers and streams are as long as they get, other strings apart."""

_STRING = 5
"""Bytes MessagePack puts before a string at the most."""


class ContainerListService:
    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def page(self, params: ListContainers, _call: Call) -> ContainerList:
        """One whose processes alone are too many for a message is listed without them."""
        containers = self._registry.containers
        names = sorted(name for name in containers if name > params.after)
        page: list[ContainerState] = []
        room = ROOM
        for name in names[: params.limit]:
            container = containers[name]
            whole = params.processes and size_of(container, True) <= ROOM
            room -= size_of(container, whole)
            if room < 0 and page:
                break
            page.append(container.state(processes=whole))
        return ContainerList(tuple(page), len(names) - len(page))


def size_of(container: Container, processes: bool) -> int:
    """Bytes of a container's state in a message, at the most."""
    strings = [container.problem, container.cgroup.path, *container.labels, *container.labels.values()]
    size = _CONTAINER
    if processes:
        for process in container.processes.values():
            size += _PROCESS
            strings += process.args
            oom = process.exit.oom if process.exit is not None else None
            if oom is not None:
                size += _VICTIM * len(oom.victims)
                strings += [oom.cgroup, oom.limit_cgroup]
    return size + sum(_STRING + len(text.encode(errors="replace")) for text in strings)
