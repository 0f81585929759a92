"""A process in the guest as its host sees it: streams, signals, and how it ended.

A container's init is created, attached to, then started; an exec runs before it can be attached to, and what
it writes meanwhile waits in its pipes. Either way nothing is lost. After the exit its record says how many
bytes each stream had then, so the output ends there even if a grandchild keeps the pipe open; a TTY ends
with the event ``stream.end``.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar

from gcsagent.host.client import Client
from gcsagent.host.errors import ClosedByPeer, HostError, OutputTooLarge
from gcsagent.host.streams import CHUNK, Stream
from protocol import checks
from protocol.errors import Code, RpcError
from protocol.families.container import CreateContainer, Created
from protocol.families.process import Exec
from protocol.families.stream import StreamName
from protocol.limits import DEFAULT_SPOOL, MIN_SPOOL
from protocol.types import ExitRecord, Stdio, StreamMode, StreamSpec, StreamState, WhenFull, Winsize

T = TypeVar("T")

STDIN, STDOUT, STDERR, TTY = (name.value for name in StreamName)

STREAM_END = "stream.end"
"""Event: ``{stream, bytes}``, the stream has given all it ever will."""

_END_SECONDS = 1.0
"""How long after a process's exit its pty may take to report its end. It ends at once, unless somebody the
process left behind still holds it; what the process itself wrote had been counted by then."""

_DEATH_SECONDS = 5.0

COLLECT_LIMIT = 64 << 20

_ATTACHABLE = (StreamMode.STREAM, StreamMode.SPOOL)


@dataclass(frozen=True, slots=True)
class Completed:
    """What :meth:`RemoteProcess.communicate` collected; with a TTY everything is in ``stdout``."""

    stdout: bytes
    stderr: bytes
    exit: ExitRecord


class RemoteProcess:
    """One process and the streams this host is attached to. Leaving its ``async with`` only detaches."""

    def __init__(self, client: Client, container: str, process: str, pid: int = 0) -> None:
        """Use :meth:`create`, :meth:`exec` or :meth:`attach`."""
        self.client = client
        self.container = container
        self.process = process
        self.pid = pid
        self.streams: dict[str, Stream] = {}

    @classmethod
    async def create(cls, client: Client, params: CreateContainer, *, attached: bool = True) -> Self:
        """Creates a container and, if ``attached``, attaches to its init; :meth:`start` lets it run.

        When attaching fails or the caller is cancelled the container is removed again. Raises what
        :meth:`Client.call` raises.
        """
        process = cls(client, params.container, checks.INIT)
        creating = asyncio.ensure_future(client.create_container(params))
        try:
            process.pid = (await _settled(creating)).pid
        except asyncio.CancelledError:
            # Only its answer tells whether it exists; deleting blindly could hit a namesake.
            if creating.done() and not creating.cancelled() and creating.exception() is None:
                with contextlib.suppress(RpcError, HostError):
                    await client.delete_container(params.container, force=True)
            raise
        try:
            await process._attach_all(_named(params.stdio) if attached else {})
        except BaseException:
            with contextlib.suppress(RpcError, HostError):
                await client.delete_container(params.container, force=True)
            raise
        return process

    @classmethod
    async def exec(cls, client: Client, params: Exec, *, attached: bool = True) -> Self:
        """Runs one more process in a container and, if ``attached``, attaches to it.

        When attaching fails or the caller is cancelled the process is killed. Raises what
        :meth:`Client.call` raises.
        """
        process = cls(client, params.container, params.process)
        request = secrets.token_hex(8)
        launching = asyncio.ensure_future(client.exec_process(params, request_id=request))
        wanted = _named(params.stdio) if attached else {}
        attaching = asyncio.ensure_future(process._attach_all(wanted, launching=(request, launching)))
        try:
            process.pid = (await launching).pid
            await attaching
        except BaseException as error:
            attaching.cancel()
            await asyncio.wait([attaching])
            process.detach()
            if process.pid or not isinstance(error, RpcError):
                await process.destroy()
            raise
        return process

    @classmethod
    async def attach(
        cls, client: Client, container: str, process: str = checks.INIT, *, take: bool = False
    ) -> Self:
        """Attaches to the streams a process was made with.

        ``take`` them from whoever is attached: of a host that has just gone the guest may not know it yet.
        Raises what :meth:`Client.attach` raises.
        """
        state = await client.process_state(container, process)
        attached = cls(client, container, process, state.pid)
        await attached._attach_all(
            {
                StreamName(name): stream
                for name, stream in state.streams.items()
                if stream.mode in _ATTACHABLE and name in (STDIN, STDOUT, STDERR, TTY)
            },
            # Of a log, what comes from now on; a spool that blocks begins with what nobody has dealt with.
            {name: stream.bytes for name, stream in state.streams.items() if _is_log(stream)},
            take=take,
        )
        return attached

    @property
    def terminal(self) -> bool:
        return TTY in self.streams

    @property
    def input(self) -> Stream | None:
        """Where its input goes: the TTY or stdin."""
        return self.streams.get(TTY) or self.streams.get(STDIN)

    @property
    def outputs(self) -> list[Stream]:
        """Where its output comes from: the TTY, or stdout and stderr."""
        return [self.streams[name] for name in (TTY, STDOUT, STDERR) if name in self.streams]

    async def start(self) -> None:
        """Lets a created container run. Cancelling takes effect once the agent has answered."""
        self.pid = (await _settled(asyncio.ensure_future(self.client.start_container(self.container)))).pid

    async def kill(self, signal: int | str = "SIGTERM") -> None:
        await self.client.kill_process(self.container, self.process, signal)

    async def resize(self, winsize: Winsize) -> None:
        await self.client.resize_process(self.container, self.process, winsize)

    async def end_input(self) -> None:
        """Ends stdin behind what has been written to it; on a TTY this types the end-of-file character."""
        if self.input is not None:
            await self.client.close_stdin(self.container, self.process, self.input.input_position)

    async def wait(self) -> ExitRecord:
        """How the process ended. From then on reads of its outputs end where it ended, and not before.

        Something must be reading the outputs meanwhile: a process whose pipe is full does not exit.
        """
        record = await self.client.wait_process(self.container, self.process)
        for stream in self.outputs:
            if stream.name in record.streams and stream.name != TTY:
                stream.finish_at(record.streams[stream.name])
            else:
                stream.finish_at(await self._end_of(stream, record))
        return record

    async def destroy(self) -> None:
        """Kills an exec and forgets it, as well as that can be done; raises nothing of the agent's."""
        with contextlib.suppress(RpcError, HostError):
            await self.kill("SIGKILL")
            await self.client.wait_process(self.container, self.process, deadline=_DEATH_SECONDS)
            await self.client.delete_process(self.container, self.process)

    async def communicate(self, data: bytes | None = None, *, limit: int = COLLECT_LIMIT) -> Completed:
        """Gives it ``data`` and the end of its input, reads all output, waits.

        Raises OutputTooLarge when one stream brings more than ``limit`` bytes, and what :meth:`wait` raises.
        """
        with first_error():
            async with asyncio.TaskGroup() as tasks:
                collected = {s.name: tasks.create_task(_collect(s, limit)) for s in self.outputs}
                feeding = tasks.create_task(self._feed(data))
                record = await self.wait()
                feeding.cancel()
        output = {name: task.result() for name, task in collected.items()}
        return Completed(output.get(TTY, output.get(STDOUT, b"")), output.get(STDERR, b""), record)

    def detach(self) -> None:
        """Closes this side's stream connections; the process does not notice."""
        for stream in self.streams.values():
            stream.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    async def _attach_all(
        self,
        wanted: Mapping[StreamName, StreamSpec | StreamState],
        offsets: Mapping[str, int] | None = None,
        launching: tuple[str, asyncio.Future[Created]] | None = None,
        *,
        take: bool = False,
    ) -> None:
        """``launching``: the exec's request_id, and the exec, which need not be waited for."""

        async def one(name: StreamName) -> None:
            where = self.container, self.process, name
            if launching is not None and (name is StreamName.TTY or wanted[name].mode is StreamMode.SPOOL):
                await asyncio.wait([launching[1]])  # what is no pipe begins with the process
            if wanted[name].mode is StreamMode.SPOOL:
                self.streams[name.value] = await self.client.attach_spool(
                    *where,
                    offset=(offsets or {}).get(name.value),
                    acknowledge=not _is_log(wanted[name]),
                    passive=not take and _is_led(wanted[name]),
                    take=take,
                    limit=_limit_of(wanted[name]),
                )
            elif launching is not None and self.client.offers("exec_request"):
                self.streams[name.value] = await self.client.attach(
                    *where, exec_request=launching[0], launching=launching[1]
                )
            else:
                if launching is not None:
                    await asyncio.wait([launching[1]])
                self.streams[name.value] = await self.client.attach(*where, take=take)

        try:
            with first_error():
                async with asyncio.TaskGroup() as tasks:
                    for name in wanted:
                        tasks.create_task(one(name))
        except BaseException:
            self.detach()
            raise

    async def _feed(self, data: bytes | None) -> None:
        if self.input is None or data is None:
            return
        with contextlib.suppress(ClosedByPeer):
            await self.input.write(data)
            await self.end_input()

    async def _end_of(self, stream: Stream, record: ExitRecord) -> int:
        """Where an output ends that the exit record cannot speak for: a TTY, or a record that was lost."""
        told = asyncio.create_task(self._told_end(stream.name))
        closed = asyncio.create_task(stream.ended())
        try:
            await asyncio.wait((told, closed), timeout=_END_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if told.done() and (total := told.result()) is not None:
                return total
        finally:
            for task in (told, closed):
                task.cancel()
            await asyncio.gather(told, closed, return_exceptions=True)
        return record.streams.get(stream.name, stream.position)

    async def _told_end(self, name: str) -> int | None:
        """The total of ``stream.end``. Subscribed before the state is asked: the event cannot be missed."""
        async with await self.client.events(container=self.container) as events:
            try:
                state = await self.client.process_state(self.container, self.process)
            except RpcError as error:
                if error.code is Code.NOT_FOUND:  # deleted meanwhile: nobody will say
                    return None
                raise
            now = state.streams.get(name)
            if now is not None and now.ended:
                return now.bytes
            async for event in events:
                total = event.data.get("bytes")
                if (event.type, event.process, event.data.get("stream")) == (STREAM_END, self.process, name):
                    return total if isinstance(total, int) else None
        return None


async def _settled(task: asyncio.Future[T]) -> T:
    """The result of ``task``; cancelling waits for its end first: what comes next meets no half of it."""
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait((task,))
        raise


def _is_log(stream: StreamSpec | StreamState) -> bool:
    return stream.when_full is WhenFull.DROP_OLDEST or (isinstance(stream, StreamSpec) and bool(stream.tee))


def _limit_of(stream: StreamSpec | StreamState) -> int:
    """Of a spool, as far as it is known."""
    return (stream.limit or DEFAULT_SPOOL) if isinstance(stream, StreamSpec) else MIN_SPOOL


def _is_led(stream: StreamSpec | StreamState) -> bool:
    """Somebody is attached to a log already: reading along takes nothing from him."""
    return isinstance(stream, StreamState) and stream.attached


def _named(stdio: Stdio) -> dict[StreamName, StreamSpec | StreamState]:
    """The streams of ``stdio`` that can be attached to."""
    modes = {STDIN: stdio.stdin, STDOUT: stdio.stdout, STDERR: stdio.stderr, TTY: stdio.tty}
    return {StreamName(name): spec for name, spec in modes.items() if spec.mode in _ATTACHABLE}


@contextlib.contextmanager
def first_error() -> Iterator[None]:
    """Raises a task group's first error bare: its siblings were cancelled, or saw the same loss."""
    try:
        yield
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None


async def _collect(stream: Stream, limit: int) -> bytes:
    collected = bytearray()
    while data := await stream.read(CHUNK):
        collected += data
        if len(collected) > limit:
            raise OutputTooLarge(f"{stream.name}: more than {limit} bytes; read it in pieces instead")
    stream.check_complete()
    return bytes(collected)
