"""The bytes of one host connection: read while there is room, written as the host takes them.

What a host does wrong costs nobody but itself. Messages are decoded one at a time, a few per turn of the
event loop, and only while the host takes our answers: one that floods waits its turn, one that does not read
is not read. One that leaves a message half sent, hello unsaid or answers untaken for ``max_stall_ms`` is
gone. So a connection holds one message that has not arrived in full, one read beyond that, MAX_UNREAD bytes
of answers, and the answers of what was in flight when those were reached.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Protocol

from gcsagent.agent.bounds import Bounds
from protocol.connection import Connection, Role, State
from protocol.errors import RemoteProtocolError
from protocol.framing import Message

READ_SIZE = 65_536
MAX_UNREAD = 256 * 1024
"""Bytes of answers a host may leave unread before its next requests are left unread, too."""

TURN, TURN_SECONDS = 64, 0.005
"""Messages handled before others have their turn, and for how long at the most (and one message more)."""


class Owner(Protocol):
    """Who is told what happens on a connection."""

    def on_message(self, message: Message) -> None: ...
    def on_breach(self, error: RemoteProtocolError) -> None: ...
    def on_drained(self) -> None:
        """Everything written has been taken."""

    def close(self, reason: str) -> None: ...


class Wire:
    """Owns the socket until :meth:`let_go`; :attr:`connection` is the contract's state on it."""

    def __init__(self, sock: socket.socket, bounds: Bounds, owner: Owner) -> None:
        self.sock = sock
        self.connection = Connection(Role.SERVER, bounds.limits)
        self._bounds, self._owner = bounds, owner
        self._loop = asyncio.get_running_loop()
        self._stall_seconds = bounds.limits.max_stall_ms / 1000
        self._fd = sock.fileno()  # asyncio looks a number up at once, and a socket by way of its repr
        self._out = bytearray()
        self._taken = 0  # bytes the host has taken so far
        self._counted = 0  # bytes of ours in bounds.unfinished
        self._reading = self._gone = False
        self._gathering = False  # in a block whose answers go out at its end
        self._turn_is_due = False
        self.turn_began = 0.0  # by the loop's clock
        self._late: asyncio.TimerHandle | None = None  # the host owes us the rest of a message, or hello
        self._stalled: asyncio.TimerHandle | None = None  # the host owes us room
        self._await_input()

    @property
    def unread(self) -> int:
        """Bytes written that the host has not taken yet."""
        return len(self._out)

    # -- in -------------------------------------------------------------------------------------

    def _on_readable(self) -> None:
        try:
            data = self.sock.recv(READ_SIZE)
        except BlockingIOError:
            return
        except OSError as error:
            self._owner.close(f"broken: {error}")
            return
        if not data:
            self._owner.close("the host closed")
            return
        self.connection.feed(data)
        self._work()

    def _work(self) -> None:
        """Handles what has arrived, up to a turn's worth."""
        self._turn_is_due = False
        try:
            with self.gathered():
                more = self._take_turn()
        except RemoteProtocolError as error:
            self._owner.on_breach(error)
            return
        if more and not self._gone:
            self._read(False)
            self._work_soon()

    def _work_soon(self) -> None:
        if not self._turn_is_due:
            self._turn_is_due = True
            self._loop.call_soon(self._work)

    def _take_turn(self) -> bool:
        """Whether there may be more for another turn. Raises RemoteProtocolError."""
        self.turn_began = self._loop.time()
        end = self.turn_began + TURN_SECONDS
        for _ in range(TURN):
            if self._gone:
                return False
            if self.unread > MAX_UNREAD:
                self._read(False)
                return False
            message = self.connection.next_message()
            if message is None:
                self._await_input()
                return False
            self._set_late(False)
            self._owner.on_message(message)
            if self._loop.time() > end:
                break
        return True

    def _await_input(self) -> None:
        """Nothing is left but, perhaps, the beginning of a message."""
        if self._gone:
            return
        self._count(self.connection.unfinished)
        limit = self._bounds.limits.max_unfinished
        if self._bounds.unfinished > limit and self.connection.unfinished > READ_SIZE:
            raise RemoteProtocolError(
                "exhausted",
                f"all connections together hold {limit} bytes of unfinished messages (max_unfinished)",
            )
        self._set_late(self.connection.unfinished > 0 or self.connection.state is State.FRESH)
        self._read(True)

    def _read(self, wanted: bool) -> None:
        if wanted == self._reading:
            return
        self._reading = wanted
        if wanted:
            self._loop.add_reader(self._fd, self._on_readable)
        else:
            self._loop.remove_reader(self._fd)

    def _count(self, unfinished: int) -> None:
        self._bounds.unfinished += unfinished - self._counted
        self._counted = unfinished

    def _set_late(self, waiting: bool) -> None:
        if waiting and self._late is None:
            self._late = self._loop.call_later(self._stall_seconds, self._on_late)
        elif not waiting and self._late is not None:
            self._late.cancel()
            self._late = None

    def _on_late(self) -> None:
        what = "hello" if self.connection.state is State.FRESH else "the rest of a message"
        self._owner.on_breach(
            RemoteProtocolError(
                "late", f"{what} did not come within {self._stall_seconds:g} s (max_stall_ms)"
            )
        )

    # -- out ------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """What is written in the block goes out at its end, at once: a send takes longer than an answer."""
        if self._gathering or self._out:
            yield
            return
        self._gathering = True
        try:
            yield
        finally:
            self._send_gathered()

    def _send_gathered(self) -> None:
        self._gathering = False
        data, self._out = self._out, bytearray()
        if not data:
            return
        self.write(data)
        if not self._out and not self._gone:
            self._owner.on_drained()
        if not self._out and not self._gone and not self._reading:
            self._work_soon()  # it was not read for what waited to go out

    def write(self, data: bytes | bytearray) -> None:
        if self._gone:
            return
        if not self._out and not self._gathering:
            try:
                data = data[self.sock.send(data) :]
            except BlockingIOError:
                pass
            except OSError as error:
                self._loop.call_soon(self._owner.close, f"broken: {error}")
                return
            if not data:
                return
            self._loop.add_writer(self._fd, self._on_writable)
            self._watch_progress()
        self._out += data
        if self.unread > MAX_UNREAD:
            self._read(False)
            self._set_late(False)  # it is we who keep it waiting

    def _on_writable(self) -> None:
        try:
            sent = self.sock.send(self._out)
        except BlockingIOError:
            return
        except OSError as error:
            self._owner.close(f"broken: {error}")
            return
        del self._out[:sent]
        self._taken += sent
        if self._out:
            return
        self._loop.remove_writer(self._fd)
        self._stop(self._stalled)
        self._owner.on_drained()
        if not self._gone and not self._reading:
            self._work()

    def _watch_progress(self) -> None:
        self._stop(self._stalled)
        self._stalled = self._loop.call_later(self._stall_seconds, self._on_stalled, self._taken)

    def _on_stalled(self, taken: int) -> None:
        if self._taken != taken:
            self._watch_progress()
        else:
            self._owner.close(f"it took nothing of {self.unread} bytes for {self._stall_seconds:g} s")

    @staticmethod
    def _stop(timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()

    # -- the end --------------------------------------------------------------------------------

    def let_go(self) -> None:
        """Nothing happens on the socket any more; it is the caller's to close or to use. Idempotent."""
        if self._gone:
            return
        if self._gathering and self._out:
            with contextlib.suppress(OSError):  # whoever closes here has nothing to add
                self.sock.send(self._out)
            self._out.clear()
        self._gone = True
        self._count(0)
        self._set_late(False)
        self._stop(self._stalled)
        self._read(False)
        self._loop.remove_writer(self._fd)
