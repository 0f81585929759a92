"""What all streams of a process share: one connection at a time, and what outlives the agent.

A stream outlives the connections attached to it. Its guest end (a pipe's end, or the pty master), its
middle pipe and the connection now attached are all held by the supervisor under names derived from the
stream's, because closing any of them is an event that somebody sees: the last copy must be closed when
the stream says so, and not when an agent dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import select
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

from gcsagent.agent.counters import CounterSlots, queued
from gcsagent.agent.relay import MiddlePipe
from gcsagent.agent.supervisor_client import SupervisorClient
from protocol.dataclass import dataclass
from protocol.errors import Code, RpcError
from protocol.types import StreamState

REPLY_SIZE = 65_536
"""Bytes of a reply at the most: what a pipe holds."""

LINGER_SECONDS = 30.0
"""How long an output connection stays open after the stream's end for its peer to close first: a guest's
close can overtake data that still sits in the VMM (hybrid vsock)."""

_log = logging.getLogger("agent.streams")


def pipe_of(data: bytes) -> int:
    """The read end of a pipe that holds ``data``, at most REPLY_SIZE bytes, and then ends. Raises OSError."""
    read_end, write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.write(write_end, data)
    except OSError:
        os.close(read_end)
        raise
    finally:
        os.close(write_end)
    return read_end


def drained(fd: int) -> bool:
    """Nothing is left in a pipe or on a terminal, and nobody has its other end any more (poll(2))."""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return [events & (select.POLLIN | select.POLLHUP) for _, events in poller.poll(0)] == [select.POLLHUP]


class Keeper:
    """Where streams keep descriptors and counts: the supervisor's store and the counter slots."""

    def __init__(self, supervisor: SupervisorClient, counters: CounterSlots) -> None:
        self.supervisor = supervisor
        self.counters = counters


@dataclass(frozen=True, slots=True)
class Load:
    """What waits in a stream's pipes, in bytes, and for how many seconds nobody has taken it."""

    queued: int = 0
    blocked: float = 0.0


@dataclass(frozen=True, slots=True)
class Attachment:
    """A client that wants a stream: its connection, and what is sent there."""

    connection: socket.socket
    reply: bytes
    """The answer to the request to attach, ahead of the stream's own bytes."""
    refusal: bytes = b""
    """Instead of the answer, when the supervisor cannot hold what this takes."""
    take: bool = False
    """Whoever is attached makes room."""
    offset: int = 0
    """Where to begin: what :meth:`Stream.check_attachable` has found."""
    passive: bool = False
    """A reader that a spool with ``tee`` does not wait for."""


class Stream(Protocol):
    """What the method table sees of a stream."""

    def attach(self, client: Attachment) -> None: ...
    def check_attachable(self, take: bool, offset: int | None = None, passive: bool = False) -> int: ...
    def close_input(self, offset: int | None) -> None: ...
    def closing_at(self) -> int | None: ...
    def state(self) -> StreamState: ...
    def load(self) -> Load: ...
    def produced(self) -> int | None:
        """Bytes through the process's end so far; None where nobody counts."""
        ...

    def process_ended(self) -> None: ...
    def settled(self) -> bool:
        """Nothing more will come, and nobody is owed a byte."""
        ...

    def idle_since(self) -> float | None:
        """Loop time since when nobody has been there for what is owed; None while somebody is, or while it
        is kept until it is acknowledged."""
        ...

    def close(self) -> None: ...


class Attachable(ABC):
    """What all real streams share: one connection at a time, and the pumps that serve it."""

    def __init__(self, keeper: Keeper, name: str, fd: int, ended: Callable[[int], None]) -> None:
        """``name`` is the stream's in the supervisor's store, where ``fd`` is held already; ``ended`` gets
        the number of bytes, once, when no more will come. ``fd`` is -1 when that was before."""
        self._keeper, self._name, self._fd, self._tell_end = keeper, name, fd, ended
        self._loop = asyncio.get_running_loop()
        self._connection: socket.socket | None = None
        self._linger: asyncio.TimerHandle | None = None
        self._freed = False
        self._reply = -1
        self._held_back = self._answerable = False
        self._idle_since = self._loop.time()
        self.ended = fd < 0
        if fd >= 0:
            os.set_blocking(fd, False)

    # -- the connection -------------------------------------------------------------------------

    @property
    def attached(self) -> bool:
        return self._connection is not None

    def check_attachable(self, take: bool, offset: int | None = None, passive: bool = False) -> int:
        """The offset an attach now would report. Raises FAILED_PRECONDITION when somebody is attached, or
        when another ``offset`` is wanted: what has gone by is nowhere any more."""
        if self.attached and not take:
            raise RpcError(
                Code.FAILED_PRECONDITION, "somebody is attached to this stream; ask with take to replace them"
            )
        position = self._offset()
        if offset is not None and offset != position:
            raise RpcError(
                Code.FAILED_PRECONDITION,
                f"this stream cannot go back or ahead: it is at {position}, not {offset}",
                offset=position,
            )
        return position

    def settled(self) -> bool:
        return self.ended

    def idle_since(self) -> float | None:
        return None if self.attached else self._idle_since

    def attach(self, client: Attachment) -> None:
        """Sends the reply, and from then on the stream's own bytes.

        Not before the supervisor has said that it holds all that this takes: else the agent's death would be
        the client's loss. When it does not, the client gets the refusal, an error, instead.

        The reply goes through a pipe that the supervisor holds together with the connection: an agent
        that takes over finds in it what has not been sent. Without that, a client might be answered twice,
        or never, when the agent is killed right here. Raises OSError, and leaves the connection the caller's.
        """
        self.check_attachable(client.take)
        self.detach()
        read_end = pipe_of(client.reply)
        try:
            more = self._to_hold()
        except OSError:
            os.close(read_end)
            raise
        self._connection, self._reply = client.connection, read_end
        fds = {f"{self._name}.conn": client.connection.fileno(), f"{self._name}.reply": read_end, **more}
        holding = self._keeper.supervisor.request(
            "hold", {"hold": {name: index for index, name in enumerate(fds)}}, tuple(fds.values())
        )
        holding.add_done_callback(functools.partial(self._on_held, client, bool(more)))

    def _on_held(
        self, client: Attachment, made: bool, holding: asyncio.Future[tuple[Any, list[int]]]
    ) -> None:
        """``made``: there is more in it than the connection and the reply."""
        connection = client.connection
        error = None if holding.cancelled() else holding.exception()
        if holding.cancelled() or error is not None:
            _log.error("a connection cannot be held", extra={"stream": self._name, "error": str(error)})
            if self._connection is connection:
                with contextlib.suppress(OSError):
                    connection.send(client.refusal)
            if made or self._connection is connection:
                self.detach()
            if made:
                self._hold_nothing()
        elif self._connection is connection:
            self._answerable = True
            if not self._held_back:
                self.begin()

    def hold_back(self) -> None:
        """Who attaches is answered by :meth:`begin`: what is in the pipes before it is the runtime's."""
        self._held_back = True

    def begin(self) -> None:
        """The process runs."""
        self._held_back = False
        if self._answerable:
            self._answerable = False
            reply, self._reply = self._reply, -1
            self._send_reply(reply)

    def _send_reply(self, reply: int) -> None:
        """Moves what is left of the reply to the connection, then begins with the stream."""
        assert self._connection is not None
        try:
            while queued(reply):
                os.splice(reply, self._connection.fileno(), REPLY_SIZE, flags=os.SPLICE_F_NONBLOCK)
        except BlockingIOError:
            self._reply = reply
            self._loop.add_writer(self._connection.fileno(), self._resume_reply)
            return
        except OSError:
            self._drop_reply(reply)
            self.detach()
            return
        self._drop_reply(reply)
        try:
            self._serve(self._connection)
        except OSError as error:  # out of descriptors: the client sees its stream close
            _log.error("a stream cannot be served", extra={"stream": self._name, "error": str(error)})
            self.detach()

    def _resume_reply(self) -> None:
        if self._connection is not None and self._reply >= 0:
            self._loop.remove_writer(self._connection.fileno())
            reply, self._reply = self._reply, -1
            self._send_reply(reply)

    def _drop_reply(self, reply: int) -> None:
        os.close(reply)
        self._keeper.supervisor.release(f"{self._name}.reply")

    def restore(self, held: dict[str, int]) -> None:
        """Goes on where an earlier agent was killed, with what it held under names below this stream's.

        ``held`` maps those suffixes (``conn``, ``out.r``, ...) to descriptors, now this stream's.
        """
        self._restore_middles(held)
        connection, reply = held.pop("conn", None), held.pop("reply", None)
        if connection is None:
            return
        self._connection = socket.socket(fileno=connection)
        self._connection.setblocking(False)
        if reply is not None:
            self._send_reply(reply)
        else:
            self._serve(self._connection)

    def _serve(self, connection: socket.socket) -> None:
        if self.ended:
            self._start_linger()
            self._watch_peer()
        else:
            self._start(connection.fileno())

    def detach(self) -> None:
        """Lets the connection go, whoever wants it; the stream itself stays as it is. Idempotent."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        self._idle_since = self._loop.time()
        self._answerable = False
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None
        self._stop()
        self._loop.remove_reader(connection.fileno())
        names = [f"{self._name}.conn"]
        reply, self._reply = self._reply, -1
        if reply >= 0:
            self._loop.remove_writer(connection.fileno())
            os.close(reply)
            names.append(f"{self._name}.reply")  # at once with the connection: without it, it would be said
        connection.close()
        self._keeper.supervisor.release(*names)

    def _start_linger(self) -> None:
        if self.attached and self._linger is None:
            self._linger = self._loop.call_later(LINGER_SECONDS, self.detach)

    def _watch_peer(self) -> None:
        """Notices that the peer of an output connection is gone, which splicing into it may never tell."""
        if self._connection is not None:
            self._loop.add_reader(self._connection.fileno(), self._on_peer)

    def _on_peer(self) -> None:
        """Drops what the peer sends where nothing may be sent (or nobody reads any more); sees it leave."""
        assert self._connection is not None
        try:
            gone = not self._connection.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            gone = True
        if gone:
            self.detach()

    def _end(self, count: int) -> None:
        if not self.ended:
            self.ended = True
            self._tell_end(count)

    # -- the middle pipe ------------------------------------------------------------------------

    def _held_middle(self, held: dict[str, int], suffix: str) -> MiddlePipe | None:
        """An earlier agent's. One that had only one end held had not been used: it is given up."""
        read_end, write_end = held.pop(f"{suffix}.r", -1), held.pop(f"{suffix}.w", -1)
        if read_end >= 0 and write_end >= 0:
            return MiddlePipe((read_end, write_end))
        for fd in (read_end, write_end):
            if fd >= 0:
                os.close(fd)
        self._keeper.supervisor.release(f"{self._name}.{suffix}.r", f"{self._name}.{suffix}.w")
        return None

    def _hold_middle(self, suffix: str) -> MiddlePipe:
        middle = MiddlePipe()
        for name, fd in self._names_of(middle, suffix).items():
            self._keeper.supervisor.hold(name, fd)
        return middle

    def _names_of(self, middle: MiddlePipe, suffix: str) -> dict[str, int]:
        return {f"{self._name}.{suffix}.r": middle.read_end, f"{self._name}.{suffix}.w": middle.write_end}

    def _drop_middle(self, middle: MiddlePipe, suffix: str) -> None:
        middle.close()
        self._keeper.supervisor.release(f"{self._name}.{suffix}.r", f"{self._name}.{suffix}.w")

    def _free(self, *slots: int) -> None:
        """Gives the counters back, once: the second time they would be another stream's."""
        if not self._freed:
            self._freed = True
            for slot in slots:
                self._keeper.counters.free(slot)

    def _drop_fd(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._keeper.supervisor.release(self._name)

    # -- for the kinds --------------------------------------------------------------------------

    def _to_hold(self) -> dict[str, int]:
        """What an attach needs beside its connection and is not held yet, by the name to hold it under.

        Raises OSError, and has made nothing.
        """
        return {}

    def _hold_nothing(self) -> None:  # noqa: B027 - most kinds have made nothing
        """What :meth:`_to_hold` made is not held: it is given up."""

    @abstractmethod
    def _restore_middles(self, held: dict[str, int]) -> None: ...

    @abstractmethod
    def _offset(self) -> int: ...

    @abstractmethod
    def _start(self, connection: int) -> None: ...

    @abstractmethod
    def _stop(self) -> None: ...
