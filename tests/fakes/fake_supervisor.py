"""The supervisor's end of the channel, in the test's own loop: it holds descriptors and notes requests."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Any

from gcsagent.agent.supervisor_client import SupervisorClient
from gcsagent.common import channel


class FakeSupervisor:
    """``client`` is what an agent would have. ``answers`` are for operations it does not know itself."""

    def __init__(self) -> None:
        self.lost = asyncio.Event()
        self.sock, theirs = channel.pair()
        self.sock.setblocking(False)
        self.client = SupervisorClient(theirs, self.lost.set)
        self._theirs = theirs
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self.sock, self._on_readable)
        self.held: dict[str, int] = {}
        self.requests: list[tuple[int, str, dict[str, Any]]] = []
        self.answers: dict[str, Any] = {}
        self.full = False

    def _on_readable(self) -> None:
        received = channel.receive(self.sock)
        if received is None:
            self._loop.remove_reader(self.sock)
            return
        (ident, operation, arguments), fds = received
        self.requests.append((ident, operation, arguments))
        if operation == "hold" and self.full:
            channel.close_all(fds)
            self.refuse(ident, "at most none are held")
        elif operation == "hold":
            kept = {name: fds[index] for name, index in arguments["hold"].items()}
            assert not kept.keys() & self.held.keys(), f"held twice: {sorted(kept)}"
            self.held.update(kept)
            self.answer(ident, None)
        elif operation == "release":
            for name in arguments["names"]:
                if name in self.held:
                    os.close(self.held.pop(name))
            self.answer(ident, 0)
        elif operation == "fetch":
            self.answer(ident, None, tuple(self.held[name] for name in arguments["names"]))
        elif operation in self.answers:
            channel.close_all(fds)
            self.answer(ident, self.answers[operation])
        else:
            channel.close_all(fds)

    def answer(self, ident: int, result: Any, fds: tuple[int, ...] = ()) -> None:
        channel.send(self.sock, channel.pack([ident, None, result]), fds)

    def refuse(self, ident: int, message: str, errno: int = 0) -> None:
        channel.send(self.sock, channel.pack([ident, {"message": message, "errno": errno}, None]))

    def notify(self, topic: str, data: Any) -> None:
        channel.send(self.sock, channel.pack([None, topic, data]))

    async def asked(self, operation: str) -> tuple[int, dict[str, Any]]:
        """The first request of a kind, once it has come."""
        async with asyncio.timeout(10):
            while True:
                for ident, name, arguments in self.requests:
                    if name == operation:
                        self.requests.remove((ident, name, arguments))
                        return ident, arguments
                await asyncio.sleep(0)

    def close(self) -> None:
        """What is still held is the test's to have looked at."""
        self._loop.remove_reader(self.sock)
        self._loop.remove_reader(self._theirs)
        self.sock.close()
        self._theirs.close()
        channel.close_all(list(self.held.values()))
        self.held.clear()


def pair() -> tuple[socket.socket, socket.socket]:
    """A connection: the agent's end, and the host's (both non-blocking)."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    return ours, theirs
