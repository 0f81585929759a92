"""The hybrid handshake: what a VMM's socket may answer to CONNECT."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Hashable
from pathlib import Path

from gcsagent.host.errors import ConnectFailed
from gcsagent.host.transport import dial
from protocol.address import HybridAddress
from tests.fuzz.target import Broken

GOOD = re.compile(rb"OK [0-9]{1,10}\r?\n")


class Handshake:
    name, coverage = "handshake", True

    def open(self, directory: Path) -> None:
        self._path = str(directory / "vmm.sock")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(self._path)
        self._listener.listen(4)
        self._listener.setblocking(False)
        self._loop = asyncio.new_event_loop()

    def close(self) -> None:
        self._listener.close()
        self._loop.close()

    def seeds(self) -> list[bytes]:
        """The first byte says into how large pieces the rest is cut."""
        lines = (
            b"OK 1073741824\n",
            b"OK 1\r\n\x94",
            b"OK\n",
            b"OK 12345678901\n",
            b"ERR 5\n",
            b"",
            b"OK 1",
            b"K" * 64,
        )
        return [bytes([step]) + line for step in (0, 1, 3) for line in lines]

    def execute(self, data: bytes) -> Hashable:
        step, data = data[:1] or b"\0", data[1:]
        return self._loop.run_until_complete(self._once((step[0] & 7) or 1 << 16, data))

    async def _once(self, step: int, data: bytes) -> Hashable:
        answering = asyncio.ensure_future(self._answer(step, data))
        match = GOOD.match(data)
        try:
            connected = await dial(HybridAddress(self._path, 1024), handshake_timeout=10.0)
        except ConnectFailed as error:
            if match:
                raise Broken("a good line was refused") from error
            if "\n" in str(error) or len(str(error)) > 1000:
                raise Broken("its error is more than a line") from error
            return type(error).__name__
        finally:
            await answering
        with connected:
            if match is None:
                raise Broken("a bad line was taken for OK")
            rest = b""
            while piece := await self._loop.sock_recv(connected, 1 << 16):
                rest += piece
            if rest != data[match.end() :]:
                raise Broken("what follows the line is not what was sent")
        return "connected", len(rest) > 0

    async def _answer(self, step: int, data: bytes) -> None:
        """Reads the request first: a close before that would be a reset."""
        peer, _ = await self._loop.sock_accept(self._listener)
        with peer:
            asked = b""
            while not asked.endswith(b"\n"):
                asked += await self._loop.sock_recv(peer, 64)
            try:
                for at in range(0, len(data), step):
                    await self._loop.sock_sendall(peer, data[at : at + step])
            except OSError:  # it has heard enough
                pass
