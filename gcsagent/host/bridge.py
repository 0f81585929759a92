"""Connects a remote process to local descriptors until it has ended and all its output is written.

Back-pressure both ways is by not reading: local output that stalls stops the reads of that one stream, so
that the process in the guest blocks as it would on a local pipe.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import Protocol, TypeVar

from gcsagent.host.errors import ClosedByPeer, HostError
from gcsagent.host.localio import LocalReader, LocalWriter
from gcsagent.host.process import STDERR, first_error
from gcsagent.host.streams import Stream
from protocol.errors import Code, RpcError

SIGPIPE_SECONDS = 2.0
"""How long a process whose output nobody reads any more has to end by SIGPIPE before SIGKILL."""


Record_co = TypeVar("Record_co", covariant=True)


class Bridged(Protocol[Record_co]):
    """What can be connected: a process in a container, or a debug shell."""

    @property
    def outputs(self) -> list[Stream]: ...
    @property
    def input(self) -> Stream | None: ...
    async def wait(self) -> Record_co: ...
    async def end_input(self) -> None: ...
    async def kill(self, signal: int | str = ...) -> None: ...


@dataclass(frozen=True, slots=True)
class LocalStdio:
    """Descriptors; ``stdin`` None gives the process no input, not even its end."""

    stdin: int | None = 0
    stdout: int = 1
    stderr: int = 2


async def bridge(process: Bridged[Record_co], local: LocalStdio) -> Record_co:
    """Moves bytes until the process has ended. Its exit record, once all it wrote is written here.

    When local output breaks (``| head``) the process gets SIGPIPE as it would at home, SIGKILL if that does
    not end it (a container's init ignores what it does not handle), and its further output is thrown away.

    Raises:
        OutputTruncated: a stream's connection ended early.
        OSError: local output failed otherwise (disk full).
        RpcError, ConnectionLost, RemoteProtocolError: from the agent.
    """
    feeding: asyncio.Task[None] | None = None
    broken = _BrokenOutput(process)
    try:
        with first_error():
            async with asyncio.TaskGroup() as tasks:
                for stream in process.outputs:
                    tasks.create_task(_drain(stream, _target(stream, local), broken))
                if local.stdin is not None and process.input is not None:
                    feeding = tasks.create_task(_feed(process, process.input, local.stdin))
                record = await process.wait()
                if feeding is not None:
                    feeding.cancel()
        for stream in process.outputs:
            stream.check_complete()
        return record
    finally:
        broken.forget()


def _target(stream: Stream, local: LocalStdio) -> int:
    return local.stderr if stream.name == STDERR else local.stdout


async def _drain(stream: Stream, fd: int, broken: _BrokenOutput) -> None:
    writer: LocalWriter | None = LocalWriter(fd)
    try:
        while data := await stream.read():
            if writer is None:
                continue
            try:
                await writer.write(data)
            except BrokenPipeError:
                writer.close()
                writer = None
                broken.report()
    finally:
        if writer is not None:
            writer.close()


async def _feed(process: Bridged[object], stream: Stream, fd: int) -> None:
    reader = LocalReader(fd)
    try:
        while data := await reader.read():
            await stream.write(data)
        await process.end_input()
    except ClosedByPeer:
        return  # it reads no more; `yes | gcsctl exec -i … true` is no error
    except RpcError as error:
        if error.code not in (Code.NOT_FOUND, Code.FAILED_PRECONDITION):
            raise
        return  # it ended before its input did


class _BrokenOutput:
    """Ends a process whose output has nowhere to go."""

    def __init__(self, process: Bridged[object]) -> None:
        self._process = process
        self._task: asyncio.Task[None] | None = None

    def report(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._end())

    def forget(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _end(self) -> None:
        with contextlib.suppress(RpcError, HostError):
            await self._process.kill("SIGPIPE")
            await asyncio.sleep(SIGPIPE_SECONDS)
            await self._process.kill("SIGKILL")
