"""The method table: every request of the contract, its arguments, its result, its deadline.

Both sides look methods up here and nowhere else; nothing off the wire is ever used as an attribute name.
A family is imported when one of its methods is looked up for the first time: an agent that has never been
asked for a mount has nothing of ``storage.*``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any, overload

from protocol.dataclass import dataclass
from protocol.method import Method

_FAMILIES = {
    "agent": ("agent", "diagnostics"),
    "events": ("events",),
    "container": ("container", "checkpoint"),
    "checkpoint": ("checkpoint",),
    "pod": ("pod",),
    "process": ("process",),
    "stream": ("stream",),
    "archive": ("archive",),
    "forward": ("forward",),
    "guest": ("guest", "snapshot"),
    "storage": ("storage",),
    "network": ("network",),
    "shell": ("shell",),
}
"""Modules of protocol.families by what the names of their methods begin with."""


class _Methods(Mapping[str, Method]):
    """All of them to whoever goes through it; for a lookup, those that begin alike."""

    def __init__(self) -> None:
        self._known: dict[str, Method] = {}
        self._left = dict(_FAMILIES)

    def __getitem__(self, name: str) -> Method:
        method = self._known.get(name)
        if method is None:
            self._load(name.partition(".")[0])
            method = self._known[name]
        return method

    @overload
    def get(self, name: str, /) -> Method | None: ...
    @overload
    def get(self, name: str, /, default: Any) -> Any: ...
    def get(self, name: str, /, default: Any = None) -> Any:
        method = self._known.get(name)
        if method is None and name.partition(".")[0] in self._left:
            self._load(name.partition(".")[0])
            method = self._known.get(name)
        return default if method is None else method

    def __contains__(self, name: object) -> bool:
        return name in self._known or (isinstance(name, str) and self.get(name) is not None)

    def __iter__(self) -> Iterator[str]:
        for kind in _FAMILIES:
            self._load(kind)
        return iter([method.name for family in families() for method in family.METHODS])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def _load(self, kind: str) -> None:
        for module in self._left.get(kind, ()):
            self._known.update({method.name: method for method in _family(module).METHODS})
        self._left.pop(kind, None)


METHODS = _Methods()


def families() -> list[ModuleType]:
    """All modules of the contract's methods, in the order of SPEC.md."""
    return [_family(name) for name in dict.fromkeys(name for names in _FAMILIES.values() for name in names)]


def _family(name: str) -> ModuleType:
    return import_module(f"protocol.families.{name}")


HELLO, ATTACH = "agent.hello", "stream.attach"

ELSEWHERE = frozenset(
    {"shell.open", "shell.resize", "shell.wait", "shell.kill", "shell.list", "shell.close_input"}
)
"""What the agent does not answer, but the debug shell's port: there is nothing else but ``agent.hello``."""

STREAMING = frozenset({ATTACH, "forward.open", "shell.open"})
"""What turns a connection into a raw byte stream: to the connection's states each is a ``stream.attach``."""

CANCEL = "rpc.cancel"
"""Notification from the client: ``{msgid}``; the request it names ends with CANCELLED if it still can."""

EVENT = "event"
"""Notification to a subscriber: one :class:`protocol.types.Event`."""

PROTOCOL_ERROR = "rpc.error"
"""Notification before a connection is closed for what its peer sent: ``{kind, message}``."""


@dataclass(frozen=True, slots=True)
class Cancel:
    msgid: int
    """Of the request to end, on this connection."""
