"""The connection, once the agent has handed it over: notifications both ways, and the one response.

Blocks, but never for longer than the deadline; while it sends it listens, so that a host that cancels or
goes away ends the work.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable

from protocol.errors import Code, RemoteProtocolError, RpcError
from protocol.families.archive import DATA, END, READY, ArchiveData, ArchiveEnd
from protocol.framing import Notification, Response, decode, encode
from protocol.limits import Limits
from protocol.methods import CANCEL, PROTOCOL_ERROR, Cancel
from protocol.scan import FrameScanner
from protocol.schema import SchemaError, from_wire

READ_SIZE = 1 << 18
LINGER_SECONDS = 30.0
"""How long the host may take to close once it has its answer: our close can overtake data that still sits in
the VMM (hybrid vsock)."""


class Gone(Exception):
    """The host has closed the connection: there is nobody to tell."""


class Peer:
    def __init__(
        self,
        sock: socket.socket,
        msgid: int,
        seconds: float | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``seconds`` is what is left until the deadline."""
        self._sock, self._msgid, self._clock = sock, msgid, clock
        self._end_at = None if seconds is None else clock() + seconds
        self._scanner = FrameScanner(Limits())
        self._rest = memoryview(b"")
        self.end: ArchiveEnd | None = None
        """What the host said its archive was, once that has come."""
        sock.setblocking(False)

    # -- in ---------------------------------------------------------------------------------------

    def next_data(self) -> bytes:
        """The archive's next bytes; b"" behind its last. Raises Gone, RpcError, RemoteProtocolError."""
        while self.end is None:
            frame = self._scanner.next_frame()
            if frame is None:
                self._receive()
            elif (data := self._take(frame)) is not None:
                return data
        return b""

    def _take(self, frame: bytes) -> bytes | None:
        message = decode(frame)
        if not isinstance(message, Notification):
            raise RemoteProtocolError("state", "nothing but notifications while an archive is under way")
        try:
            if message.method == DATA:
                return from_wire(ArchiveData, message.params).data or None
            if message.method == END:
                self.end = from_wire(ArchiveEnd, message.params)
            if message.method == CANCEL and from_wire(Cancel, message.params).msgid == self._msgid:
                raise RpcError(Code.CANCELLED, "the archive was cancelled")
        except SchemaError as error:
            raise RemoteProtocolError("malformed", f"{message.method[:64]}: {error}") from error
        return None

    def _receive(self) -> None:
        """Waits for bytes and takes them in."""
        while True:
            try:
                data = self._sock.recv(READ_SIZE)
            except BlockingIOError:
                self._poll(select.POLLIN)
                continue
            except OSError as error:
                raise Gone(str(error)) from error
            if not data:
                raise Gone("the host closed the connection")
            self._scanner.feed(data)
            return

    # -- out --------------------------------------------------------------------------------------

    def ready(self) -> None:
        self.send(encode(Notification(READY, {})))

    def send_data(self, data: bytes) -> None:
        self.send(encode(Notification(DATA, {"data": data})))

    def send(self, frame: bytes) -> None:
        """Raises Gone, and RpcError when the deadline passes or the host cancels."""
        self._rest = memoryview(frame)
        while self._rest:
            try:
                self._rest = self._rest[self._sock.send(self._rest) :]
            except BlockingIOError:
                if self._poll(select.POLLOUT | select.POLLIN) & select.POLLIN:
                    self._listen()
            except OSError as error:
                raise Gone(str(error)) from error

    def listen(self) -> None:
        """Takes what the host has said, without waiting. Raises Gone, RpcError."""
        poller = select.poll()
        poller.register(self._sock, select.POLLIN)
        if poller.poll(0):
            self._listen()

    def _listen(self) -> None:
        self._receive()
        while (frame := self._scanner.next_frame()) is not None:
            self._take(frame)

    def _poll(self, events: int) -> int:
        poller = select.poll()
        poller.register(self._sock, events)
        left = None if self._end_at is None else max(0.0, self._end_at - self._clock())
        ready = poller.poll(None if left is None else left * 1000)
        if not ready:
            raise RpcError(Code.DEADLINE_EXCEEDED, "the archive was not through within its deadline")
        return ready[0][1]

    # -- the end ----------------------------------------------------------------------------------

    def answer(self, result: object, error: RpcError | None) -> None:
        """Sends the response, then waits for the host to close. Raises Gone."""
        self._end_at = self._clock() + LINGER_SECONDS
        response = Response(self._msgid, None if error is None else error.to_wire(), result)
        self._finish(encode(response))

    def farewell(self, error: RemoteProtocolError) -> None:
        """Says why the connection is closed. Raises Gone."""
        self._end_at = self._clock() + LINGER_SECONDS
        self._finish(encode(Notification(PROTOCOL_ERROR, error.to_wire())))

    def _finish(self, frame: bytes) -> None:
        """What still comes is dropped: closed with bytes unread, a connection loses what was sent."""
        rest = memoryview(bytes(self._rest) + frame)  # a message that was begun is ended first
        try:
            while True:
                try:
                    if rest:
                        rest = rest[self._sock.send(rest) :]
                    if not self._sock.recv(READ_SIZE):
                        return
                except BlockingIOError:
                    self._poll(select.POLLIN | (select.POLLOUT if rest else 0))
        except (OSError, RpcError) as error:
            raise Gone(str(error)) from error
