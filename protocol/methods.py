"""The method table: every request of the contract, its arguments, its result, its deadline.

Both sides look methods up here and nowhere else; nothing off the wire is ever used as an attribute name.
"""

from __future__ import annotations

from protocol.dataclass import dataclass
from protocol.families import (
    agent,
    archive,
    checkpoint,
    container,
    diagnostics,
    events,
    forward,
    guest,
    network,
    pod,
    process,
    shell,
    snapshot,
    storage,
    stream,
)
from protocol.method import Method

FAMILIES = (
    agent,
    diagnostics,
    events,
    container,
    checkpoint,
    pod,
    process,
    stream,
    archive,
    forward,
    guest,
    snapshot,
    storage,
    network,
    shell,
)

METHODS: dict[str, Method] = {method.name: method for family in FAMILIES for method in family.METHODS}

HELLO, ATTACH = "agent.hello", "stream.attach"

ELSEWHERE = frozenset(method.name for method in shell.METHODS)
"""What the agent does not answer, but the debug shell's port: there is nothing else but ``agent.hello``."""

STREAMING = frozenset(name for name, method in METHODS.items() if method.streams)
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
