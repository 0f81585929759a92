"""The host's client, and a guest that answers whatever it likes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable, Hashable
from pathlib import Path
from typing import Any

import msgpack

from gcsagent.host import dialogue
from gcsagent.host.agentlog import AgentLog
from gcsagent.host.archive import get_archive, put_archive
from gcsagent.host.client import Client
from gcsagent.host.errors import ConnectFailed, HostError
from gcsagent.host.process import RemoteProcess
from gcsagent.host.transport import Address
from protocol.address import UnixAddress
from protocol.errors import ProtocolError, RpcError
from protocol.families.archive import GetArchive, PutArchive
from protocol.families.process import Exec
from protocol.families.stream import StreamName
from protocol.methods import ATTACH, HELLO, METHODS
from protocol.schema import from_wire
from protocol.types import Stdio, StreamMode, StreamSpec
from tests.fuzz import vectors
from tests.fuzz.target import Broken

SECONDS = 10.0
CONNECTIONS = 4
"""As many are answered; after these there is no guest any more."""

ODD_METHODS = (HELLO, ATTACH, "events.subscribe")
"""They have a way of their own through the client."""

Use = Callable[[Client], Awaitable[object]]


async def _nothing(_data: bytes) -> None:
    pass


async def _one_piece() -> Any:
    yield b"x" * 1000


async def _events(client: Client) -> None:
    async with await client.events() as events:
        async for _ in events:
            pass


async def _attach(client: Client) -> None:
    async with await client.attach("web") as stream:
        stream.finish_at(1000)
        while await stream.read():
            pass
        stream.check_complete()


async def _spool(client: Client) -> None:
    async with await client.attach_spool("web", "init", StreamName.STDOUT, acknowledge=True) as stream:
        for _ in range(20):
            if not await stream.read(100):
                break


async def _exec(client: Client) -> None:
    output = StreamSpec(StreamMode.STREAM)
    params = Exec("web", "p", {"args": ["true"]}, Stdio(output, output, output))
    async with await RemoteProcess.exec(client, params) as process:
        await process.communicate(b"data")


async def _log(client: Client) -> None:
    async for _ in AgentLog(client).entries():
        pass


def _calls(method: str) -> Use:
    return lambda client: client.call(method, from_wire(METHODS[method].params, vectors.requests()[method]))


USES: list[Use] = [
    _events,
    _attach,
    _spool,
    _exec,
    _log,
    lambda client: get_archive(client, GetArchive("/etc", digest=True), _nothing),
    lambda client: put_archive(client, PutArchive(), _one_piece(), digest=True),
    lambda client: client.list_containers(),
    lambda client: client.container_processes("web"),
    *(_calls(method) for method in METHODS if method not in ODD_METHODS),
]
NAMES = [
    "events",
    ATTACH,
    ATTACH,
    "process.exec",
    "agent.logs",
    "archive.get",
    "archive.put",
    "container.list",
]
NAMES += ["container.processes", *(method for method in METHODS if method not in ODD_METHODS)]


class Guest:
    name, coverage = "guest", True

    def open(self, directory: Path) -> None:
        logging.getLogger().handlers[:] = [logging.NullHandler()]
        self._loop = asyncio.new_event_loop()
        self._strays: list[dict[str, Any]] = []
        self._loop.set_exception_handler(lambda _loop, context: self._strays.append(context))
        self._real = vars(dialogue)["dial"]
        vars(dialogue)["dial"] = self._dial  # what answers is elsewhere, at the end of a socket

    def close(self) -> None:
        vars(dialogue)["dial"] = self._real
        self._loop.close()

    def seeds(self) -> list[bytes]:
        """``[use, whether hello is answered well, [[error, result], ...], raw bytes]``."""
        good = dict(zip(METHODS, _results(), strict=True))
        found = []
        for use, name in enumerate(NAMES):
            replies = [[None, good.get(name, {"last": 0})]] * 2
            event = msgpack.packb([2, "event", [{"seq": 1, "time_ns": 1, "type": "x"}]])
            data = msgpack.packb([2, "archive.data", [{"data": b"x"}]])
            ready = msgpack.packb([2, "archive.ready", [{}]])
            for raw in (b"", event, ready + data):
                found.append(msgpack.packb([use, True, replies, raw]))
        for wire in ({"code": "NOT_FOUND", "message": "m", "details": {}}, {}, 7):
            found.append(msgpack.packb([8, True, [[wire, None]], b""]))
        found.append(msgpack.packb([9, False, [[None, good[HELLO]]], b""]))
        return found

    def execute(self, data: bytes) -> Hashable:
        try:
            use, greets, replies, raw = msgpack.unpackb(data, strict_map_key=False)
            script = [reply for reply in replies if isinstance(reply, list) and len(reply) == 2]
            number = use % len(USES) if type(use) is int else 0
            raw = raw if isinstance(raw, bytes) else b""
        except (ValueError, TypeError, msgpack.UnpackException):
            return None
        outcome = self._loop.run_until_complete(self._once(number, bool(greets), script, raw))
        if self._strays:
            context = self._strays[0]
            self._strays.clear()
            raise context.get("exception") or Broken(str(context["message"]))
        return NAMES[number], outcome

    async def _once(self, number: int, greets: bool, script: list[Any], raw: bytes) -> Hashable:
        self._left, self._script, self._raw, self._greets = CONNECTIONS, iter(script), raw, greets
        self._serving: list[asyncio.Task[None]] = []
        try:
            async with asyncio.timeout(SECONDS):
                async with await Client.connect(UnixAddress("guest"), timeout=5.0, patience=0.05) as client:
                    await USES[number](client)
            return "done"
        except TimeoutError as error:
            raise Broken(f"{NAMES[number]} has not come to an end in {SECONDS:g} s") from error
        except (RpcError, HostError, ProtocolError) as error:
            if "\n" in str(error) and len(str(error)) > 20_000:
                raise Broken("an error of unbounded size") from error
            return type(error).__name__, getattr(error, "kind", getattr(error, "code", ""))
        finally:
            for task in self._serving:
                task.cancel()
            await asyncio.gather(*self._serving, return_exceptions=True)

    # -- the guest --------------------------------------------------------------------------------

    async def _dial(self, _address: Address) -> socket.socket:
        self._left -= 1
        if self._left < 0:
            raise ConnectFailed("there is no guest any more")
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        self._serving.append(asyncio.create_task(self._serve(ours)))
        return theirs

    async def _serve(self, sock: socket.socket) -> None:
        """Each request is answered by what comes next; at the end raw bytes, and the close."""
        loop = asyncio.get_running_loop()
        unpacker = msgpack.Unpacker(raw=False, strict_map_key=False)
        with sock, contextlib.suppress(OSError, StopIteration):
            while data := await loop.sock_recv(sock, 1 << 16):
                unpacker.feed(data)
                for message in unpacker:
                    if message[0] != 0:
                        continue
                    if message[2] == HELLO and self._greets:
                        error, result = (
                            None,
                            {"protocol": 1, "agent_version": "x", "boot_id": "b", "generation": 1},
                        )
                    elif (reply := next(self._script, None)) is None:
                        await loop.sock_sendall(sock, self._raw)
                        return
                    else:
                        error, result = reply
                    await loop.sock_sendall(sock, msgpack.packb([1, message[1], error, result]))
                    if message[2] in ("archive.put", "archive.get", "events.subscribe", ATTACH):
                        await loop.sock_sendall(sock, self._raw)
                        return


def _results() -> list[Any]:
    """A good result of each method, by the contract's own defaults where no golden frame has one."""
    named = vectors.named("results")
    return [named.get(method, [1, 0, None, {}])[3] for method in METHODS]
