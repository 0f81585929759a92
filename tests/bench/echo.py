"""The baseline of ``ping``: asyncio, msgpack, and nothing that an agent needs beside them."""

from __future__ import annotations

import asyncio
import sys
import time

import msgpack


class Echo(asyncio.Protocol):
    """Decodes each request and encodes an answer that holds what a ping's does."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._unpacker = msgpack.Unpacker(raw=False)

    def data_received(self, data: bytes) -> None:
        self._unpacker.feed(data)
        for _, msgid, _, _ in self._unpacker:
            result = {"generation": 1, "uptime_ms": time.monotonic_ns() // 1_000_000, "loop_lag_us": 0}
            self._transport.write(msgpack.packb([1, msgid, None, result], use_bin_type=True))


async def main(path: str) -> None:
    server = await asyncio.get_running_loop().create_unix_server(Echo, path)
    await server.serve_forever()


asyncio.run(main(sys.argv[1]))
