"""What a pause, a resume and an update have in common: one at a time, and written down beforehand.

The runtime's call has a name of its own, so that an agent which finds a change it did not begin can wait
for that call's end before it lets another one through (:mod:`gcsagent.agent.reload`): a call that ended
later would win over it.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from gcsagent.agent.journal import RequestMark
from gcsagent.agent.logs import context
from gcsagent.agent.runtime import change_call
from protocol.dataclass import dataclass, field

if TYPE_CHECKING:
    from gcsagent.agent.container import Container
    from gcsagent.agent.registry import Registry

_log = logging.getLogger("agent.changes")


@dataclass(frozen=True, slots=True)
class Change:
    """``kind`` is pause, resume or update; ``detail`` what is needed to finish or undo it."""

    kind: str
    request: RequestMark | None
    detail: dict[str, Any] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        return {"kind": self.kind, "request": self.request, "detail": self.detail}


def read(document: Any) -> Change | None:
    """From container.json. Raises KeyError or TypeError for what is none."""
    if document is None:
        return None
    mark = document["request"]
    request = None if mark is None else RequestMark(str(mark[0]), str(mark[1]))
    return Change(str(document["kind"]), request, dict(document["detail"]))


def end(registry: Registry, container: Container) -> None:
    """It is through, or has been undone: that is written down before the runtime's call is forgotten."""
    container.change = None
    save(container)
    registry.caller.forget(change_call(container.ident))


def save(container: Container) -> None:
    """What the container is now is true whether or not it can be written; the next agent looks again."""
    try:
        container.save()
    except OSError as error:
        context(_log, container=container.ident).error(
            "a container's status cannot be written down", extra={"error": str(error)}
        )
