"""Cases about forwards: what reaches a container's ports and sockets, and how both ends are told."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
from collections.abc import AsyncIterator
from typing import Any

import pytest

from gcsagent.host.client import Client
from gcsagent.host.errors import ClosedByPeer, HostError
from gcsagent.host.forward import Controls, Forwarder, ForwardStream, listen
from gcsagent.host.process import RemoteProcess
from protocol.errors import Code, RpcError
from protocol.families.forward import CloseWrite, ForwardRef, OpenForward
from tests.cases.target import (
    MIB,
    OUTPUT,
    Target,
    case,
    connect,
    expect,
    refused,
    running,
)

ECHO, TALKER, DEAF, QUIET = 7001, 7002, 7003, 7004
TALK = 3 * MIB
SERVER = f"TALK, ECHO, TALKER, DEAF, QUIET = {TALK}, {ECHO}, {TALKER}, {DEAF}, {QUIET}"
SERVER += """
import contextlib, os, socket, threading, time

def echo(client):
    while data := client.recv(65536):
        client.sendall(data)
    client.sendall(b"bye")

def talk(client):
    "Ends what it sends first, and then counts what it is sent."
    client.sendall(bytes(TALK))
    with contextlib.suppress(OSError):  # ENOTCONN of one that was reset this moment; reading says how
        client.shutdown(socket.SHUT_WR)
    count = 0
    while data := client.recv(65536):
        count += len(data)
    print("counted", count, flush=True)

def be_deaf(client):
    time.sleep(100000)

def serve(listener, work):
    def one(client):
        try:
            with client:
                work(client)
        except OSError as error:
            print("broke", error.errno, flush=True)
    while True:
        client, _ = listener.accept()
        threading.Thread(target=one, args=(client,), daemon=True).start()

os.makedirs("/run/servers", exist_ok=True)
unix = socket.socket(socket.AF_UNIX)
unix.bind("/run/servers/echo")
unix.listen(128)
os.symlink("/run/servers/echo", "/run/inside")
os.symlink("../../../../../../../run/servers/echo", "/run/upwards")
datagrams = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
datagrams.bind("/run/datagrams")
listeners = [(unix, echo)]
for port, work in (ECHO, echo), (TALKER, talk), (DEAF, be_deaf):
    listeners.append((socket.create_server(("127.0.0.1", port), backlog=128), work))
listeners.append((socket.create_server(("::1", QUIET), family=socket.AF_INET6), echo))
for each in listeners:
    threading.Thread(target=serve, args=each, daemon=True).start()
print("ready", flush=True)
time.sleep(100000)
"""


@contextlib.asynccontextmanager
async def serving(target: Target, client: Client, **more: Any) -> AsyncIterator[RemoteProcess]:
    """A container with a network of its own, in which SERVER listens."""
    async with running(target, client, "python3", "-c", SERVER, stdio=OUTPUT, **more) as init:
        await expect(init.streams["stdout"], b"ready\n")
        yield init


@contextlib.asynccontextmanager
async def forwarding(client: Client, to: OpenForward) -> AsyncIterator[tuple[int, list[Exception]]]:
    """The local port that leads there, and the errors of its connections."""
    listener, errors = listen(("127.0.0.1", 0)), list[Exception]()
    forwarder = Forwarder(Controls(client), listener, to, errors.append)
    try:
        yield listener.getsockname()[1], errors
    finally:
        await forwarder.aclose()


async def ask_echo(port: int, data: bytes) -> None:
    """Sends it, ends, and must get all of it back, and what the server says behind the end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:

        async def send() -> None:
            writer.write(data)
            await writer.drain()
            writer.write_eof()

        sending, back, count = asyncio.create_task(send()), hashlib.sha256(), 0
        while piece := await reader.read(65536):
            back.update(piece)
            count += len(piece)
        await sending
        assert (count, back.digest()) == (len(data) + 3, hashlib.sha256(data + b"bye").digest())
    finally:
        writer.close()


async def read_all(stream: ForwardStream) -> bytes:
    """Until the target's end."""
    whole = bytearray()
    while data := await stream.read():
        whole += data
    return bytes(whole)


@case
async def forwards_carry_many_clients_byte_for_byte(target: Target) -> None:
    """One after the other, all at once, and much of it both ways; the clients use half-close."""
    slow = target.pace > 10
    async with await connect(target) as client, serving(target, client) as server:
        to = OpenForward(server.container, ECHO)
        async with forwarding(client, to) as (port, errors):
            for number in range(20 if slow else 200):
                await ask_echo(port, b"%d" % number * number)
            await asyncio.gather(*(ask_echo(port, os.urandom(20_000)) for _ in range(20 if slow else 50)))
            await ask_echo(port, os.urandom((8 if slow else 64) * MIB))
            assert not errors


@case
async def both_ends_of_a_forward_are_told(target: Target) -> None:
    """The target may end first, or the client; what comes behind is counted by whoever still listens."""
    async with await connect(target) as client, serving(target, client) as server:
        async with await ForwardStream.open(client, OpenForward(server.container, TALKER)) as stream:
            assert stream.to == f"127.0.0.1:{TALKER}"
            assert await read_all(stream) == bytes(TALK)
            await stream.write(bytes(100_000))  # it has ended, and still listens
            await stream.close_write()
        await expect(server.streams["stdout"], b"counted 100000\n")
        async with await ForwardStream.open(client, OpenForward(server.container, QUIET)) as stream:
            assert stream.to == f"[::1]:{QUIET}"  # nobody listens on 127.0.0.1
            await stream.write(b"a")
            await asyncio.gather(stream.close_write(), stream.close_write())  # may be said again
            assert await read_all(stream) == b"abye"
            ident = stream.ident
            with refused(Code.FAILED_PRECONDITION):
                await client.call("forward.close_write", CloseWrite(ident, 2))
        async with await ForwardStream.open(client, OpenForward(server.container, TALKER)) as stream:
            await stream.write(b"not the end")
        await expect(server.streams["stdout"], b"broke 104\n")  # a loss, and not an end of file
        for method, params in (("wait", ForwardRef(ident)), ("close_write", CloseWrite(ident, 1))):
            with refused(Code.NOT_FOUND):
                await client.call(f"forward.{method}", params)


@case
async def forwards_reach_sockets_and_never_outside(target: Target) -> None:
    async with await connect(target) as client, serving(target, client) as server:
        where = server.container
        for path in ("/run/servers/echo", "/run/inside", "/run/upwards", "/proc/1/root/../run/servers/echo"):
            async with await ForwardStream.open(client, OpenForward(where, path=path)) as stream:
                await stream.write(path.encode())
                await stream.close_write()
                assert await read_all(stream) == path.encode() + b"bye"
        with refused_because(Code.NOT_FOUND, "ENOENT"):  # it is the container's, not the guest's
            await ForwardStream.open(client, OpenForward(path="/run/servers/echo"))
        for to, code, why in (
            (OpenForward(where, 7999), Code.FAILED_PRECONDITION, "ECONNREFUSED"),
            (OpenForward(None, ECHO), Code.FAILED_PRECONDITION, "ECONNREFUSED"),
            (OpenForward(where, ECHO, "192.0.2.1"), Code.UNAVAILABLE, "ENETUNREACH"),
            (OpenForward(where, path="/run/nothing"), Code.NOT_FOUND, "ENOENT"),
            (OpenForward(where, path="/etc/passwd/x"), Code.NOT_FOUND, "ENOTDIR"),
            (OpenForward(where, path="/etc/passwd"), Code.FAILED_PRECONDITION, "ENOTSOCK"),
            (OpenForward(where, path="/run/datagrams"), Code.FAILED_PRECONDITION, "EPROTOTYPE"),
        ):
            with refused_because(code, why):
                await ForwardStream.open(client, to)
        for to, field in (
            (OpenForward(where), "port"),
            (OpenForward(where, 80, path="/run/servers/echo"), "port"),
            (OpenForward(where, path="/run/servers/echo", address="::1"), "address"),
            (OpenForward(where, 80, "fe80::1%lo"), "address"),
            (OpenForward(where, 0), "port"),
            (OpenForward(where, path="run/servers/echo"), "path"),
        ):
            with refused(Code.INVALID_ARGUMENT, field=field):
                await ForwardStream.open(client, to)
        with refused(Code.NOT_FOUND):
            await ForwardStream.open(client, OpenForward("nobody", 80))


@case
async def a_forward_into_the_guest_itself(target: Target) -> None:
    """A container without a network namespace of its own listens in the guest's."""

    def share(spec: dict[str, Any]) -> None:
        spec["linux"]["namespaces"] = [ns for ns in spec["linux"]["namespaces"] if ns["type"] != "network"]

    server = (
        "import socket; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True)"
    )
    reply = "; c, _ = s.accept(); c.sendall(c.recv(9)[::-1])"
    async with (
        await connect(target) as client,
        running(target, client, "python3", "-c", server + reply, stdio=OUTPUT, spec=share) as init,
    ):
        port = int(await expect(init.streams["stdout"], rb"[0-9]+\n"))
        async with await ForwardStream.open(client, OpenForward(port=port)) as stream:
            await stream.write(b"guest")
            assert await read_all(stream) == b"tseug"


@case
async def a_stalled_target_and_a_dead_one_harm_nobody(target: Target) -> None:
    """Back-pressure stops one client alone; when the container dies its clients see that, and at once."""
    async with await connect(target) as client, serving(target, client) as server:
        where = server.container
        async with (
            forwarding(client, OpenForward(where, ECHO)) as (port, errors),
            await ForwardStream.open(client, OpenForward(where, DEAF)) as deaf,
            await ForwardStream.open(client, OpenForward(where, ECHO)) as idle,
        ):
            flood = asyncio.create_task(deaf.write(bytes(64 * MIB)))
            await asyncio.gather(*(ask_echo(port, os.urandom(200_000)) for _ in range(10)))
            assert not flood.done()
            async with await ForwardStream.open(client, OpenForward(where, DEAF)) as left:
                await left.write(bytes(1000))  # its connection is closed while the target reads nothing
            await idle.write(b"still there")
            assert await idle.read() == b"still there"
            assert not errors
            await client.kill_container(where, "SIGKILL")
            with pytest.raises((HostError, RpcError)):
                await read_all(deaf)
            flood.cancel()
            with contextlib.suppress(asyncio.CancelledError, ClosedByPeer):
                await flood
            assert await ended(idle)
            await client.wait_container(where)
            with refused(Code.FAILED_PRECONDITION):
                await ForwardStream.open(client, OpenForward(where, ECHO))


@case
async def deleting_a_container_ends_its_forwards(target: Target) -> None:
    """Its network would live on otherwise: here it is another container that answers."""
    async with await connect(target) as client, contextlib.AsyncExitStack() as stack:
        first = await stack.enter_async_context(serving(target, client))
        stream = await ForwardStream.open(client, OpenForward(first.container, ECHO))
        async with stream:
            await stream.write(b"x")
            assert await stream.read() == b"x"
            await stack.aclose()
            assert await ended(stream)


async def ended(stream: ForwardStream) -> bool:
    """Its target has ended, in order or not."""
    with contextlib.suppress(HostError, RpcError):
        assert await read_all(stream) in (b"", b"bye")
    return True


@contextlib.contextmanager
def refused_because(code: Code, why: str) -> Any:
    with pytest.raises(RpcError) as caught:
        yield
    assert (caught.value.code, caught.value.details) == (code, {"errno": getattr(errno, why)}), caught.value
