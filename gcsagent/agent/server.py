"""Listens, checks who it is, and makes a session of each connection.

The listening sockets are held by the supervisor: connections made while no agent runs wait in them.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable

from gcsagent.agent.bounds import Bounds
from gcsagent.agent.session import Session
from gcsagent.listening import listen_unix, listen_vsock
from protocol.address import UnixAddress, parse_listen

MAX_STRANGERS = 256
"""Connections that have not said hello. One more, and the oldest gives way: who says hello at once, as hosts
do, gets in, however many others only connect."""

ACCEPT_PAUSE = 0.5
"""Seconds without accepting when descriptors have run out: accepting at once would only spin."""

_log = logging.getLogger("agent.server")


class ListenError(Exception):
    """An address that cannot be listened on; the message says why."""


class Server:
    """``make_session`` gets the connection, the peer's name, and this: to be let in, and to say it left."""

    def __init__(
        self,
        peer_cid: int | None,
        make_session: Callable[[socket.socket, str, Server], Session],
        bounds: Bounds | None = None,
    ) -> None:
        self._peer_cid, self._make_session = peer_cid, make_session
        self._bounds = bounds or Bounds()
        self._loop = asyncio.get_running_loop()
        self._strangers: dict[Session, None] = {}  # in the order they came
        self._guests: set[Session] = set()

    def admit(self, session: Session) -> None:
        """It has said hello. Raises RESOURCE_EXHAUSTED; it may try again."""
        if len(self._guests) >= self._bounds.limits.max_connections:
            raise self._bounds.exhausted("max_connections", "connections are open: close some, or try again")
        self._strangers.pop(session, None)
        self._guests.add(session)
        self._bounds.sessions = len(self._guests)

    def gone(self, session: Session) -> None:
        self._strangers.pop(session, None)
        self._guests.discard(session)
        self._bounds.sessions = len(self._guests)

    def serve(self, listener: socket.socket) -> None:
        listener.setblocking(False)
        self._loop.add_reader(listener, self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, address = listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                _log.error("cannot accept", extra={"error": str(error)})
                self._loop.remove_reader(listener)
                self._loop.call_later(ACCEPT_PAUSE, self._loop.add_reader, listener, self._accept, listener)
            return
        peer = self._peer_name(listener, address)
        if peer is None:
            _log.warning("a peer that is not the host was refused", extra={"peer": str(address)})
            connection.close()
        else:
            if len(self._strangers) >= MAX_STRANGERS:
                next(iter(self._strangers)).close("it did not say hello, and others wait")
            connection.setblocking(False)
            self._strangers[self._make_session(connection, peer, self)] = None

    def _peer_name(self, listener: socket.socket, address: object) -> str | None:
        if listener.family != socket.AF_VSOCK:
            return "unix"
        assert isinstance(address, tuple)
        cid, port = address
        return f"vsock:{cid}:{port}" if self._peer_cid in (None, cid) else None


def listen(text: str) -> socket.socket:
    """A listening socket for ``unix:PATH`` or ``vsock[:PORT]``. Raises ListenError."""
    address = parse_listen(text)
    try:
        if isinstance(address, UnixAddress):
            return listen_unix(address.path)
        return listen_vsock(address.port)
    except OSError as error:
        raise ListenError(f"cannot listen on {text}: {error.strerror or error}") from error
