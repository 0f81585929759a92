"""What the cases run against, and the few moves they are made of.

A case is a coroutine that takes a :class:`Target`; :func:`case` puts it on the list that tests/runc runs
over a UNIX socket and tests/vm over vsock. Cases leave nothing behind: every container and process they
make goes again, also when they fail.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest

from gcsagent.host.client import Client
from gcsagent.host.dialogue import answer, greet
from gcsagent.host.process import Completed, RemoteProcess
from gcsagent.host.spec import container_spec, exec_spec
from gcsagent.host.streams import Stream
from protocol.address import parse_dial
from protocol.errors import Code, RpcError
from protocol.families.container import CreateContainer
from protocol.families.process import Exec
from protocol.framing import Response
from protocol.types import Event, Stdio, StreamMode, StreamSpec, Winsize

MIB = 1 << 20
STREAM = StreamSpec(StreamMode.STREAM)
OUTPUT = Stdio(stdout=STREAM, stderr=STREAM)
PIPES = Stdio(STREAM, STREAM, STREAM)


@dataclass(frozen=True, slots=True)
class Target:
    """An agent under test.

    ``rootfs`` is the demo root as the agent sees it, and is never written to: containers get an overlay.
    ``box`` is a container that runs all the while, for execs. ``pace`` is how many times slower things may
    be than on bare metal; ``execs`` how many are asked for at once. ``runtime`` is what containers ask for.
    """

    address: str
    rootfs: str
    box: str
    pace: float
    execs: int
    runtime: str = ""


Case = Callable[[Target], Awaitable[None]]
CASES: list[Case] = []

_numbers = itertools.count(1)


def case(function: Case) -> Case:
    CASES.append(function)
    return function


def name(stem: str) -> str:
    """An id that no other case uses."""
    return f"{stem}-{os.getpid()}-{next(_numbers)}"


def terminal(rows: int = 24, cols: int = 80) -> Stdio:
    return Stdio(tty=STREAM, terminal=True, winsize=Winsize(rows, cols))


async def connect(target: Target) -> Client:
    return await Client.connect(target.address, timeout=10 * target.pace, client_name="tests")


# -- containers and processes ---------------------------------------------------------------------


def creation(target: Target, ident: str, args: tuple[str, ...], **more: Any) -> CreateContainer:
    """Arguments of a create; ``spec`` among ``more`` changes the spec made from the rest."""
    change = more.pop("spec", None)
    tty = more.get("stdio", Stdio()).terminal
    spec = container_spec(container=ident, rootfs=target.rootfs, args=args, terminal=tty)
    if change is not None:
        change(spec)
    more.setdefault("runtime", target.runtime)
    return CreateContainer(ident, spec, overlay=more.pop("overlay", True), **more)


@contextlib.asynccontextmanager
async def created(
    target: Target, client: Client, *args: str, attached: bool = True, **more: Any
) -> AsyncIterator[RemoteProcess]:
    """A container whose init is ``args``, created and not started; removed at the end, whatever it does."""
    params = creation(target, name("c"), args or ("sleep", "100000"), **more)
    init = await RemoteProcess.create(client, params, attached=attached)
    try:
        async with init:
            yield init
    finally:
        await remove(client, params.container)


@contextlib.asynccontextmanager
async def running(target: Target, client: Client, *args: str, **more: Any) -> AsyncIterator[RemoteProcess]:
    """Likewise, and started."""
    async with created(target, client, *args, **more) as init:
        await init.start()
        yield init


async def remove(client: Client, container: str) -> None:
    try:
        await client.delete_container(container, force=True)
    except RpcError as error:
        if error.code is not Code.NOT_FOUND:
            raise


@contextlib.asynccontextmanager
async def executing(
    client: Client,
    container: str,
    *args: str,
    stdio: Stdio = OUTPUT,
    attached: bool = True,
    **more: Any,
) -> AsyncIterator[RemoteProcess]:
    """An exec; killed if need be, and forgotten, at the end."""
    spec = exec_spec(args=args, terminal=stdio.terminal)
    params = Exec(container, more.pop("process", None) or name("p"), spec, stdio, **more)
    process = await RemoteProcess.exec(client, params, attached=attached)
    try:
        async with process:
            yield process
    finally:
        await forget(client, process)


async def forget(client: Client, process: RemoteProcess) -> None:
    """Kills an exec if need be and deletes its record, unless all of that has happened."""
    where = process.container, process.process
    try:
        if (await client.process_state(*where)).exit is None:
            with contextlib.suppress(RpcError):
                await client.kill_process(*where, "SIGKILL")
            await client.wait_process(*where, deadline=20.0)
        await client.delete_process(*where)
    except RpcError as error:
        if error.code is not Code.NOT_FOUND:
            raise


async def run(
    client: Client, container: str, *args: str, data: bytes | None = None, stdio: Stdio = OUTPUT
) -> Completed:
    """An exec from start to end, with all its output."""
    async with executing(client, container, *args, stdio=stdio) as process:
        return await process.communicate(data)


# -- waiting and looking --------------------------------------------------------------------------


async def expect(stream: Stream, pattern: bytes, seen: bytearray | None = None) -> bytes:
    """Reads until ``pattern``, a regular expression, has come; returns everything read.

    ``seen`` is read into, so that one expect can go on where another stopped.
    """
    seen = bytearray() if seen is None else seen
    while (match := re.search(pattern, seen)) is None:
        data = await stream.read()
        assert data, f"the stream ended without {pattern!r}: {bytes(seen)!r}"
        seen += data
    found = bytes(match.group())
    del seen[: match.end()]
    return found


async def event(events: AsyncIterator[Event], kind: str, container: str, process: str | None = None) -> Event:
    """The next event of this kind about them."""
    async for each in events:
        if (each.type, each.container) == (kind, container) and process in (None, each.process):
            return each
    raise AssertionError("the subscription ended")


@contextlib.contextmanager
def refused(code: Code, *, exec_error: str | None = None, field: str | None = None) -> Any:
    """The block must end with exactly this error."""
    with pytest.raises(RpcError) as caught:
        yield caught
    error = caught.value
    assert error.code is code, f"{code} was expected, not {error} {error.details}"
    assert error.message
    assert exec_error is None or error.details.get("exec_error") == exec_error, error.details
    assert field is None or error.details.get("field") == field, error.details


async def raw_call(target: Target, method: str, params: dict[str, Any]) -> Any:
    """A request past our own client's checks. Raises the RpcError it is answered with."""
    return answer(await raw_answers(target, [(method, params)]))


async def raw_answers(target: Target, requests: list[tuple[str, dict[str, Any]]]) -> Response:
    """Sends them at once on a connection of their own; returns the response that comes first."""
    dialogue, _ = await greet(parse_dial(target.address), timeout=10 * target.pace, client_name="raw")
    try:
        frames = [
            dialogue.connection.request(100 + index, method, params)
            for index, (method, params) in enumerate(requests)
        ]
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(dialogue.sock, b"".join(frames))
        while True:
            for message in dialogue.connection.receive(await loop.sock_recv(dialogue.sock, 65536)):
                if isinstance(message, Response):
                    return message
    finally:
        dialogue.close()


async def nothing_left(target: Target, client: Client) -> None:
    """Only the box is there, and in it only its init."""
    listed = await client.list_containers()
    assert [container.container for container in listed] == [target.box], listed
    assert [process.process for process in listed[0].processes] == ["init"], listed[0].processes
