"""The agent's end of the channel to the supervisor."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import socket
from collections.abc import Callable
from typing import Any

from gcsagent.common import channel

MAX_RELEASED = 64
"""Names in one packet: a few more of the longest fit."""

_log = logging.getLogger("agent.supervisor")


class SupervisorError(Exception):
    """The supervisor refused or could not do what it was asked; ``errno`` is 0 or the kernel's reason."""

    def __init__(self, message: str, errno: int) -> None:
        super().__init__(message)
        self.errno = errno


class SupervisorClient:
    """Requests to the supervisor. ``lost`` is called when it is gone: nothing is left to do then."""

    def __init__(self, sock: socket.socket, lost: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._lost = lost
        self._idents = itertools.count(1)
        self._pending: dict[int, asyncio.Future[tuple[Any, list[int]]]] = {}
        self._outbox: list[tuple[bytes, tuple[int, ...]]] = []
        self._released: list[str] = []
        self.topics: dict[str, Callable[[dict[str, Any]], None]] = {}
        sock.setblocking(False)
        self._loop.add_reader(sock, self._on_readable)

    def request(
        self, operation: str, arguments: dict[str, Any], fds: tuple[int, ...] = ()
    ) -> asyncio.Future[tuple[Any, list[int]]]:
        """Sends a request at once; the future gives (result, descriptors) or raises SupervisorError.

        The descriptors are duplicated by the kernel as they are sent: the caller may close its own
        when this returns.
        """
        ident = next(self._idents)
        future: asyncio.Future[tuple[Any, list[int]]] = self._loop.create_future()
        self._pending[ident] = future
        try:
            self._send(channel.pack([ident, operation, arguments]), fds)
        except OSError as error:  # no room to keep descriptors that cannot be sent yet
            del self._pending[ident]
            future.set_exception(SupervisorError(str(error), error.errno or 0))
        return future

    async def fetch(self, names: list[str]) -> list[int]:
        """What is held under ``names``, as descriptors that are the caller's. Raises SupervisorError.

        A task can be cancelled when its answer is there and it has not gone on yet: descriptors that come
        for it then, or have just come, would be nobody's, and are closed.
        """
        future = self.request("fetch", {"names": names})
        try:
            _, fds = await asyncio.shield(future)
        except asyncio.CancelledError:
            future.add_done_callback(_close_received)
            raise
        return fds

    async def call(self, operation: str, arguments: dict[str, Any], fds: tuple[int, ...] = ()) -> Any:
        """A request whose answer carries no descriptors."""
        result, received = await self.request(operation, arguments, fds)
        channel.close_all(received)
        return result

    def tell(self, operation: str, arguments: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        """A request nobody waits for; a refusal is logged. The channel keeps its order with later ones."""
        self._send(channel.pack([-next(self._idents), operation, arguments]), fds)

    def keep_telling_alive(self, interval: float) -> None:
        """Now and every ``interval`` seconds, as long as the event loop goes round (supervisor.watchdog)."""
        self.tell_alive()
        self._loop.call_later(interval, self.keep_telling_alive, interval)

    def tell_alive(self) -> None:
        if not self._outbox:
            self._send(channel.pack([None, "alive", {}]), ())

    def hold(self, name: str, fd: int) -> None:
        """Has the supervisor keep a duplicate of ``fd`` beyond this agent's death."""
        self.tell("hold", {"hold": {name: 0}}, (fd,))

    def release(self, *names: str) -> None:
        """Told together with what else is released in this turn of the loop, before anything said later."""
        if not self._released:
            self._loop.call_soon(self._tell_released)
        self._released += names
        if len(self._released) >= MAX_RELEASED:
            self._tell_released()

    def _tell_released(self) -> None:
        names, self._released = self._released, []
        if names:
            self.tell("release", {"names": names})

    async def everything(self, kind: str) -> list[Any]:
        """All of one kind that the supervisor keeps: names, calls, processes or exits.

        A page begins with the last item of the one before. Where that has changed, one before it has gone
        meanwhile and the rest moved up: one of them might be missed.
        """
        items: list[Any] = []
        while True:
            page = await self.call("list", {"kind": kind, "start": max(0, len(items) - 1)})
            if items and [_key(item) for item in page[:1]] != [_key(items[-1])]:
                items = []
                continue
            more = page[1:] if items else page
            if not more:
                return items
            items += more

    def _send(self, packet: bytes, fds: tuple[int, ...]) -> None:
        self._tell_released()
        if not self._outbox:
            try:
                channel.send(self._sock, packet, fds)
                return
            except BlockingIOError:
                self._loop.add_writer(self._sock, self._on_writable)
            except OSError as error:
                _log.error("cannot reach the supervisor", extra={"error": str(error)})
                self._loop.call_soon(self._on_lost)
                return
        self._outbox.append((packet, tuple(os.dup(fd) for fd in fds)))

    def _on_writable(self) -> None:
        while self._outbox:
            packet, fds = self._outbox[0]
            try:
                channel.send(self._sock, packet, fds)
            except BlockingIOError:
                return
            except OSError:
                break  # it is gone, as the reader is about to find
            del self._outbox[0]
            channel.close_all(fds)
        self._loop.remove_writer(self._sock)

    def _on_readable(self) -> None:
        for _ in range(64):  # let others run between bursts
            try:
                received = channel.receive(self._sock)
            except BlockingIOError:
                return
            except (OSError, channel.ChannelError) as error:
                _log.error("the channel to the supervisor is broken", extra={"error": str(error)})
                received = None
            if received is None:
                self._on_lost()
                return
            self._on_packet(*received)

    def _on_packet(self, message: list[Any], fds: list[int]) -> None:
        ident, error, result = message
        if ident is None:
            handler = self.topics.get(error)
            if handler is not None:
                handler(result)
            return
        if ident < 0:  # of an earlier version's supervisor also the answers nobody waits for
            channel.close_all(fds)
            if error is not None:
                _log.error("the supervisor refused", extra={"error": error["message"]})
            return
        future = self._pending.pop(ident, None)
        if future is None or future.done():
            channel.close_all(fds)
        elif error is not None:
            channel.close_all(fds)
            future.set_exception(SupervisorError(error["message"], error["errno"]))
        else:
            future.set_result((result, fds))

    def _on_lost(self) -> None:
        self._loop.remove_reader(self._sock)
        self._lost()


def _close_received(future: asyncio.Future[tuple[Any, list[int]]]) -> None:
    if not future.cancelled() and future.exception() is None:
        channel.close_all(future.result()[1])


def _key(item: Any) -> str:
    """Of a listed item: a name, or a key and what belongs to it."""
    return str(item if isinstance(item, str) else item[0])
