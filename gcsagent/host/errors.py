"""How talking to an agent can fail, by cause.

How a *request* ended is :class:`protocol.errors.RpcError`; a peer that broke the contract is
:class:`protocol.errors.RemoteProtocolError`. What remains is here: the agent was never reached, or the
connection to it is gone, and then who ended it.
"""

from __future__ import annotations

from protocol.errors import Code, RpcError


class HostError(Exception):
    """Base of what this package raises itself; ``str()`` is one line that says what to do."""


class ConnectFailed(HostError):
    """The agent could not be reached."""


class NotReady(ConnectFailed):
    """Nobody answers there yet: worth trying again."""


class HandshakeFailed(ConnectFailed):
    """The VMM's socket answered ``CONNECT`` with something that is not ``OK <port>``."""


class ConnectionLost(HostError):
    """The connection is gone. Requests then outstanding may or may not have been carried out."""


class ClosedByPeer(ConnectionLost):
    """The agent closed it, cleanly."""


class ConnectionBroken(ConnectionLost):
    """It broke: reset, or an error of the transport."""


class ClosedByUs(ConnectionLost):
    """It was used after this side had closed it."""


class EventsMissed(HostError):
    """Events are gone that nobody was given.

    Attributes:
        dropped: how many; 0: the agent's numbering began anew, so that nobody can say.
    """

    def __init__(self, dropped: int) -> None:
        super().__init__(
            f"{dropped} events were missed: the agent no longer had them"
            if dropped
            else "the numbering of events began anew: what was there before is gone"
        )
        self.dropped = dropped


class OutputTruncated(HostError):
    """A stream's connection ended before everything the process wrote had come through it."""


class AgentSilent(RpcError):
    """The agent let a request's deadline pass without answering at all; the host gave up on it."""

    def __init__(self, method: str, seconds: float) -> None:
        super().__init__(
            Code.DEADLINE_EXCEEDED,
            f"no answer to {method} in {seconds:g} s; the agent may hang or the VM be overloaded",
        )


class OutputTooLarge(HostError):
    """A process wrote more than was to be kept in memory."""
