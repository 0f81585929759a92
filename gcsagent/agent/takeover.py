"""A connection that stops carrying messages and becomes a raw byte stream.

A method of the contract that ``streams`` has an :data:`Opener` here instead of a handler: it checks the
request and does what may take time, such as connecting, and returns what the connection is handed to. The
session does the rest: nothing outstanding, the deadline, the host that leaves meanwhile, earlier answers that
are still on their way out.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from typing import Any, Protocol


class Takeover(Protocol):
    """What a connection is about to be handed to: either :meth:`take` or :meth:`drop` is called, once."""

    def result(self) -> object:
        """The answer to the request, asked for when it can be sent. Raises RpcError when it changed its
        mind; :meth:`drop` is called then."""
        ...

    def take(self, connection: socket.socket, reply: bytes, refusal: bytes) -> None:
        """Sends ``reply``, or ``refusal`` when the supervisor does not hold what must be held; owns the
        connection from here on. Raises OSError, and leaves it the caller's."""
        ...

    def drop(self) -> None:
        """Nobody is there any more."""
        ...


Opener = Callable[[Any], Awaitable[Takeover]]
"""Gets the request's parameters; its deadline, and the host's leaving, cancel it. Raises RpcError."""
