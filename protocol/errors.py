"""Errors of the contract: those a call can end with, and those that end a connection.

Three kinds, never mixed (the rule is h11's): what the other side did wrong is a
:class:`RemoteProtocolError`, what our own caller did wrong is a :class:`LocalProtocolError`, and how a
request ended is an :class:`RpcError`. Anything else that escapes this package is a bug in it.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any


class Code(StrEnum):
    """How a request failed. The set is closed: a client may switch on it."""

    NOT_FOUND = "NOT_FOUND"
    """No such container, process, bundle or file."""
    ALREADY_EXISTS = "ALREADY_EXISTS"
    """The id is taken, or the request_id belongs to another request."""
    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    """An argument is missing, of the wrong type or nonsense in any state; ``details.field`` names it."""
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    """The state does not allow it now: delete while running, attach while attached, start twice."""
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    """It took longer than deadline_ms; what it had begun was undone."""
    CANCELLED = "CANCELLED"
    """``rpc.cancel`` ended it before its commit point; what it had begun was undone."""
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    """A bound was reached: requests in flight, processes, descriptors, disk, the size of the answer."""
    PERMISSION_DENIED = "PERMISSION_DENIED"
    """The guest's configuration or kernel forbids it."""
    UNAVAILABLE = "UNAVAILABLE"
    """Not now, but trying again may help: the agent is going down, or a part of it is restarting."""
    UNIMPLEMENTED = "UNIMPLEMENTED"
    """The agent has no such method, or this guest cannot do it."""
    INTERNAL = "INTERNAL"
    """The runtime or the agent failed in a way the caller did not cause; ``details`` holds what is known."""


class RpcError(Exception):
    """A request that failed.

    ``message`` is one sentence that says what to do; ``details`` may hold ``runtime_error`` (runc's own
    line), ``exec_error``, ``exit_status``, ``stderr``, ``errno``, ``field``. :meth:`to_wire` is the only
    place where an error becomes a map.
    """

    def __init__(self, code: Code, message: str, **details: Any) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.details: dict[str, Any] = details

    def __str__(self) -> str:
        return f"{self.code.value}: {self.message}"

    def to_wire(self) -> dict[str, Any]:
        """The error as the third element of a MessagePack-RPC response."""
        wire: dict[str, Any] = {"code": self.code.value, "message": self.message}
        if self.details:
            wire["details"] = self.details
        return wire

    @classmethod
    def from_wire(cls, wire: object) -> RpcError:
        """The error a response carried; what cannot be understood becomes INTERNAL, never a crash."""
        if not isinstance(wire, dict):
            return cls(Code.INTERNAL, f"the peer sent an error that is not a map: {type(wire).__name__}")
        try:
            code = Code(str(wire.get("code")))
        except ValueError:
            code = Code.INTERNAL
        message = wire.get("message")
        error = cls(code, message if message and isinstance(message, str) else "the peer gave no reason")
        details = wire.get("details")
        if isinstance(details, dict):
            error.details = {key: value for key, value in details.items() if isinstance(key, str)}
        return error


class ProtocolError(Exception):
    """The connection cannot go on."""


class RemoteProtocolError(ProtocolError):
    """The other side broke the contract; ``kind`` is a stable word for it (``oversized``, ``depth``, ...)."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message

    def to_wire(self) -> dict[str, Any]:
        """The parameters of the one ``rpc.error`` notification sent before the connection is closed."""
        return {"kind": self.kind, "message": self.message}


class LocalProtocolError(ProtocolError):
    """Our own caller asked for something the connection's state does not allow."""
