"""An agent without containers: the real contract over a UNIX socket, the answers from a script."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gcsagent.host.client import Client
from protocol.connection import Connection, Role
from protocol.errors import Code, RemoteProtocolError, RpcError
from protocol.families.agent import Welcome
from protocol.families.archive import DATA, END, READY, Archived
from protocol.families.stream import Attach, Attached
from protocol.framing import Message, Notification, Request
from protocol.method import Empty
from protocol.methods import CANCEL, EVENT, HELLO, METHODS
from protocol.schema import from_wire, to_wire
from protocol.types import Event, ExitRecord, Reason

Handler = Callable[[Any], Any]
"""From typed parameters to a result (or a map, for answers the contract does not allow); may be async."""

RawStream = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]


def exit_record(code: int = 0, *, signal: int = 0, **streams: int) -> ExitRecord:
    reason = Reason.SIGNALLED if signal else Reason.EXITED
    return ExitRecord(code, signal, reason, 42, 1_000, 2_000, streams=streams)


class FakeAgent:
    """Answers with ``handlers[method]``; what is not in there is UNIMPLEMENTED. ``calls`` has what came."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.handlers: dict[str, Handler] = {HELLO: lambda params: Welcome(1, "fake", "boot", 1)}
        self.streams: dict[str, RawStream] = {}
        self.offsets: dict[str, int] = {}
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.cancelled: list[str] = []
        self.archives: list[bytearray] = []
        self.subscribers: list[_Served] = []
        self.connections: list[_Served] = []
        self._server: asyncio.Server | None = None

    @property
    def address(self) -> str:
        return f"unix:{self.path}"

    def named(self, method: str) -> list[dict[str, Any]]:
        """The parameters of each call of ``method``, without the client's own ``request_id``."""
        return [
            {key: value for key, value in params.items() if key != "request_id"}
            for name, params in self.calls
            if name == method
        ]

    def request_ids(self, method: str) -> list[str | None]:
        return [params.get("request_id") for name, params in self.calls if name == method]

    def publish(self, event: Event) -> None:
        for served in self.subscribers:
            served.notify(EVENT, to_wire(event))

    def drop_all(self) -> None:
        """Cuts every connection; the agent goes on listening."""
        for served in list(self.connections):
            served.writer.transport.abort()

    async def __aenter__(self) -> FakeAgent:
        self._server = await asyncio.start_unix_server(self._serve, self.path)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        tasks = [served.task for served in self.connections]
        self.drop_all()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        served = _Served(self, reader, writer, task)
        self.connections.append(served)
        try:
            with contextlib.suppress(OSError, RemoteProtocolError, asyncio.CancelledError):
                await served.run()
        finally:
            self.connections.remove(served)
            if served in self.subscribers:
                self.subscribers.remove(served)
            for running in served.running.values():
                running.cancel()
            await asyncio.gather(*served.running.values(), return_exceptions=True)
            writer.close()


@dataclass(eq=False)
class _Served:
    agent: FakeAgent
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    task: asyncio.Task[Any]
    connection: Connection = field(default_factory=lambda: Connection(Role.SERVER))
    running: dict[int, asyncio.Task[None]] = field(default_factory=dict)
    archive_ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        while data := await self.reader.read(65536):
            for message in self.connection.receive(data):
                if isinstance(message, Request) and message.method == "stream.attach":
                    if await self._attach(message):
                        return
                else:
                    self._take(message)

    def notify(self, method: str, params: dict[str, Any]) -> None:
        self.writer.write(self.connection.notify(method, params))

    def _take(self, message: Message) -> None:
        if isinstance(message, Request):
            self.running[message.msgid] = asyncio.create_task(self._answer(message))
        elif isinstance(message, Notification) and message.method == CANCEL:
            running = self.running.get(message.params["msgid"])
            if running is not None:
                running.cancel()
        elif isinstance(message, Notification) and message.method == DATA:
            self.agent.archives[-1] += message.params["data"]
        elif isinstance(message, Notification) and message.method == END:
            self.archive_ended.set()

    async def _answer(self, request: Request) -> None:
        self.agent.calls.append((request.method, request.params))
        try:
            result = await self._result(request)
        except RpcError as error:
            frame = self.connection.fail(request.msgid, error)
        except asyncio.CancelledError:
            self.agent.cancelled.append(request.method)
            frame = self.connection.fail(request.msgid, RpcError(Code.CANCELLED, "cancelled"))
        else:
            frame = self.connection.respond(request.msgid, to_wire(result))
        self.running.pop(request.msgid, None)
        if request.method == "events.subscribe":
            self.agent.subscribers.append(self)
        self.writer.write(frame)

    async def _result(self, request: Request) -> Any:
        handler = self.agent.handlers.get(request.method)
        if handler is None and request.method == "archive.put":
            return await self._archive()
        if handler is None:
            raise RpcError(Code.UNIMPLEMENTED, f"the fake has no {request.method}")
        result = handler(from_wire(METHODS[request.method].params, request.params))
        return await result if inspect.isawaitable(result) else result

    async def _archive(self) -> Archived:
        """Takes it into ``archives``."""
        self.agent.archives.append(bytearray())
        self.notify(READY, {})
        await self.archive_ended.wait()
        return Archived(len(self.agent.archives[-1]), 1)

    async def _attach(self, request: Request) -> bool:
        self.agent.calls.append((request.method, request.params))
        wanted = from_wire(Attach, request.params)
        stream = self.agent.streams.get(wanted.stream.value)
        if stream is None:
            refusal = RpcError(Code.FAILED_PRECONDITION, f"{wanted.stream.value} is null")
            self.writer.write(self.connection.fail(request.msgid, refusal))
            return False
        offset = self.agent.offsets.get(wanted.stream.value, 0)
        self.writer.write(self.connection.respond(request.msgid, to_wire(Attached(offset))))
        await stream(self.reader, self.writer)
        return True


@dataclass
class Script:
    """What a fake process does: writes, copies its stdin with ``echo``, and ends with ``code``.

    Its outputs stay open after the exit, as a grandchild would keep them.
    """

    stdout: bytes = b""
    stderr: bytes = b""
    code: int = 0
    echo: bool = False
    runs_until_killed: bool = False
    received: bytearray = field(default_factory=bytearray)
    stdin_end: int | None = None
    started: asyncio.Event = field(default_factory=asyncio.Event)
    progress: asyncio.Condition = field(default_factory=asyncio.Condition)
    killed_by: list[int | str] = field(default_factory=list)

    def install(self, agent: FakeAgent) -> None:
        agent.handlers |= {
            "container.create": lambda params: {"pid": 42},
            "container.start": lambda params: self._begin(),
            "process.exec": lambda params: self._begin(),
            "process.wait": self._wait,
            "process.kill": self._kill,
            "process.delete": lambda params: {},
            "process.resize": lambda params: Empty(),
            "process.close_stdin": self._close_stdin,
            "container.delete": lambda params: {},
        }
        agent.streams |= {
            "stdin": self._stdin,
            "stdout": lambda reader, writer: self._write(reader, writer, self.stdout, echo=self.echo),
            "stderr": lambda reader, writer: self._write(reader, writer, self.stderr, echo=False),
        }

    def _begin(self) -> dict[str, int]:
        self.started.set()
        return {"pid": 42}

    async def _stdin(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            async with self.progress:
                self.received += data
                self.progress.notify_all()

    async def _write(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes, *, echo: bool
    ) -> None:
        await self.started.wait()
        writer.write(data)
        if echo:
            await self._stdin_ended()
            writer.write(bytes(self.received))
        with contextlib.suppress(OSError):
            await writer.drain()
        await reader.read()  # open until the host closes

    async def _stdin_ended(self) -> None:
        async with self.progress:
            await self.progress.wait_for(
                lambda: self.stdin_end is not None and len(self.received) >= self.stdin_end
            )

    async def _close_stdin(self, params: Any) -> Empty:
        async with self.progress:
            self.stdin_end = params.offset
            self.progress.notify_all()
        return Empty()

    async def _kill(self, params: Any) -> Empty:
        async with self.progress:
            self.killed_by.append(params.signal)
            self.progress.notify_all()
        return Empty()

    async def _wait(self, params: Any) -> ExitRecord:
        await self.started.wait()
        if self.runs_until_killed:
            async with self.progress:
                await self.progress.wait_for(lambda: bool(self.killed_by))
            return exit_record(143, signal=15, stdout=len(self.stdout), stderr=len(self.stderr))
        if self.echo:
            await self._stdin_ended()
        length = len(self.stdout) + (len(self.received) if self.echo else 0)
        return exit_record(self.code, stdout=length, stderr=len(self.stderr))


@contextlib.asynccontextmanager
async def raw_server(path: Path, handler: RawStream) -> AsyncIterator[str]:
    """A UNIX socket where ``handler`` does what it likes with each connection. Yields its path."""
    tasks: set[asyncio.Task[Any]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await handler(reader, writer)
        finally:
            tasks.discard(task)
            writer.close()

    server = await asyncio.start_unix_server(serve, path)
    try:
        yield str(path)
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def with_client(tmp_path: Path, body: Callable[[FakeAgent, Client], Awaitable[None]]) -> None:
    """Runs it, with a client of the agent."""

    async def scenario() -> None:
        async with (
            FakeAgent(tmp_path / "gcs.sock") as agent,
            await Client.connect(agent.address, timeout=5) as client,
        ):
            await body(agent, client)

    asyncio.run(scenario())
