"""Forwards: bytes and ends both ways, what is lost and how that is seen, and that nothing stays behind."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import pytest

from gcsagent.agent import attachable
from gcsagent.agent.attachable import Attachment
from gcsagent.agent.forwarding.forward import HELD, Forward, Identity
from gcsagent.agent.forwarding.hangups import Hangups
from gcsagent.agent.forwarding.service import Forwards, split
from gcsagent.agent.registry import Registry
from protocol.errors import Code, RpcError
from protocol.families.forward import ForwardEnd
from tests.fakes.fake_supervisor import pair
from tests.unit.test_agent_streams import REPLY, Bench, closed, on_bench, read

REPO = Path(__file__).parents[2]
RESET = struct.pack("ii", 1, 0)


class Scene:
    """A forward between ``host`` and ``target``, each the other end of what it holds."""

    def __init__(self, bench: Bench, tcp: bool) -> None:
        self.bench, self.gone = bench, list[Forward]()
        self.hangups = Hangups()
        counters = bench.keeper.counters
        slots = counters.allocate(), counters.allocate(), counters.allocate()
        self.identity = Identity("g1-1", "web.1", slots)
        ours, self.target = connected() if tcp else pair()
        self.target.setblocking(False)
        self.connection, self.host = pair()
        self.forward = self.make(ours.detach())
        self.forward.attach(Attachment(self.connection, REPLY, b"<refusal>"))

    def make(self, fd: int) -> Forward:
        return Forward(self.bench.keeper, self.identity, fd, self.hangups, self.gone.append)

    async def begun(self) -> Scene:
        assert await read(self.host, len(REPLY)) == REPLY
        return self

    def successor(self) -> Forward:
        """The agent was killed: another one goes on with what the supervisor holds."""
        self.forward._stop()
        loop = asyncio.get_running_loop()
        loop.remove_reader(self.connection)
        self.hangups.forget(self.connection.fileno())
        for fd in (self.forward._fd, self.connection.detach()):
            os.close(fd)
        for middle, _ in self.forward._middles:
            middle.close()
        fds = {split(name)[1]: os.dup(fd) for name, fd in self.bench.supervisor.held.items()}
        assert set(fds) == HELD
        self.forward = self.make(fds.pop(""))
        self.forward.restore(fds)
        assert not fds
        return self.forward

    async def over(self) -> None:
        """Nothing is left of it but what the scene itself has opened."""
        await self.bench.until(lambda: bool(self.gone))
        assert self.gone == [self.forward]
        self.host.close()
        self.target.close()
        assert self.hangups._epoll is None


def connected() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        return ours, listener.accept()[0]


def on_scene(body: Callable[[Scene], Awaitable[None]], tcp: bool = True) -> None:
    async def work(bench: Bench) -> None:
        scene = await Scene(bench, tcp).begun()
        await body(scene)
        await scene.over()

    on_bench(work)


async def end_of(sock: socket.socket) -> str:
    """How it ends: ``eof``, or the error's name."""
    try:
        await closed(sock)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "eof"


@pytest.mark.parametrize("tcp", [True, False])
def test_both_ends_are_told_and_nothing_is_left(tcp: bool) -> None:
    async def body(scene: Scene) -> None:
        forward = scene.forward
        closing = asyncio.create_task(forward.close_write(7))  # before the bytes, and again behind them
        scene.host.send(b"request")
        assert await read(scene.target, 7) == b"request"
        assert scene.target.recv(1) == b""
        await closing
        await forward.close_write(7)
        waiting = asyncio.create_task(forward.wait())
        scene.target.send(b"reply")
        assert await read(scene.host, 5) == b"reply"
        assert not waiting.done()
        scene.target.close()
        assert await waiting == await forward.wait() == ForwardEnd(5)
        with pytest.raises(RpcError) as caught:
            await forward.close_write(8)
        assert (caught.value.code, caught.value.details) == (Code.FAILED_PRECONDITION, {"offset": 7})
        assert not scene.gone
        scene.host.close()

    on_scene(body, tcp)


def test_the_agent_closes_when_the_host_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attachable, "LINGER_SECONDS", 0.01)

    async def body(scene: Scene) -> None:
        scene.target.close()
        assert await scene.forward.wait() == ForwardEnd(0)
        await asyncio.sleep(0.05)
        assert not scene.gone  # the host has not ended what it sends
        await scene.forward.close_write(0)
        assert await end_of(scene.host) == "eof"

    on_scene(body)


@pytest.mark.parametrize("stalled", [False, True])
def test_a_host_that_leaves_resets_the_target(stalled: bool) -> None:
    async def body(scene: Scene) -> None:
        if stalled:  # the forward waits for the target, and does not read the host
            with contextlib.suppress(BlockingIOError):
                while True:
                    scene.host.send(bytes(65536))
                    await scene.bench.settle()
            assert scene.forward._input is not None
            assert scene.forward._input.in_middle
        waiters: list[asyncio.Task[Any]] = [asyncio.create_task(scene.forward.wait())]
        if stalled:
            waiters.append(asyncio.create_task(scene.forward.close_write(1 << 40)))
        await asyncio.sleep(0)
        scene.host.close()
        for result in await asyncio.gather(*waiters, return_exceptions=True):
            assert isinstance(result, RpcError)
            assert result.code is Code.UNAVAILABLE
        assert await end_of(scene.target) == "ECONNRESET"

    on_scene(body)


def test_a_target_that_breaks_is_told_behind_its_last_byte() -> None:
    async def body(scene: Scene) -> None:
        scene.target.send(b"last words")
        assert await read(scene.host, 10) == b"last words"
        scene.target.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        scene.target.close()
        assert await scene.forward.wait() == ForwardEnd(10, errno.ECONNRESET)
        scene.host.send(b"for nobody")
        await scene.forward.close_write(10)
        scene.host.close()

    on_scene(body)


def test_what_a_target_breaks_with_is_known_to_a_successor() -> None:
    """The kernel tells it once; a socket that broke reads as one that ended in order from then on."""

    async def body(scene: Scene) -> None:
        scene.target.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        scene.target.close()
        assert await scene.forward.wait() == ForwardEnd(0, errno.ECONNRESET)
        assert await scene.successor().wait() == ForwardEnd(0, errno.ECONNRESET)
        scene.host.close()

    on_scene(body)


def test_a_successor_counts_on() -> None:
    async def body(scene: Scene) -> None:
        scene.host.send(b"one ")
        assert await read(scene.target, 4) == b"one "
        scene.target.send(b"two ")
        assert await read(scene.host, 4) == b"two "
        forward = scene.successor()
        closing = asyncio.create_task(forward.close_write(9))
        scene.host.send(b"three")
        assert await read(scene.target, 5) == b"three"
        await closing
        assert scene.target.recv(1) == b""
        scene.target.send(b"four")
        scene.target.close()
        assert await forward.wait() == ForwardEnd(8)
        assert await read(scene.host, 4) == b"four"
        scene.host.close()

    on_scene(body)


def test_a_container_that_is_deleted_breaks_both() -> None:
    async def body(scene: Scene) -> None:
        scene.forward.abort()
        assert await end_of(scene.target) == "ECONNRESET"
        assert await end_of(scene.host) == "eof"

    on_scene(body)


def test_what_the_supervisor_cannot_hold_is_refused() -> None:
    async def body(bench: Bench) -> None:
        bench.supervisor.full = True
        scene = Scene(bench, tcp=True)
        assert await read(scene.host, 9) == b"<refusal>"
        assert await end_of(scene.target) == "ECONNRESET"
        await scene.over()

    on_bench(body)


def test_names_say_everything() -> None:
    identity = Identity("g12-3", "web.1", (7, 8, 70))
    assert identity.name == "forward/web.1/g12-3:7:8:70"
    assert Identity.parse(identity.name) == identity
    assert split(f"{identity.name}.out.r") == (identity.name, "out.r")
    assert split(identity.name) == (identity.name, "")
    assert Identity.parse(Identity("g1-1", "", (1, 2, 3)).name).container == ""
    assert Forwards.claimed({identity.name, f"{identity.name}.conn"}) == {7, 8, 70}


def test_what_was_being_given_up_is_given_up() -> None:
    """A forward without its connection, and one whose container is gone."""

    async def body(bench: Bench) -> None:
        class Fake:
            keeper, containers, events = bench.keeper, {"web": None}, None

        forwards = Forwards.__new__(Forwards)
        forwards._registry, forwards._forwards = cast(Registry, Fake()), {}
        counters, null = bench.keeper.counters, os.open("/dev/null", os.O_RDONLY)
        for container, missing in (("web", "conn"), ("gone", "")):
            slots = counters.allocate(), counters.allocate(), counters.allocate()
            name = Identity("g1-1", container, slots).name
            for suffix in HELD - ({missing} if missing else set()):
                bench.supervisor.client.hold(f"{name}.{suffix}" if suffix else name, null)
        os.close(null)
        await bench.settle()
        await forwards.restore(bench.supervisor.client, set(bench.supervisor.held))
        assert forwards._forwards == {}

    on_bench(body)


def test_an_agent_that_cannot_come_back_from_a_network_ends_at_once() -> None:
    program = """
import os, socket
from gcsagent.agent.forwarding import netns

calls = []
def setns(fd, kind):
    calls.append(kind)
    if len(calls) > 1:
        raise PermissionError(1, "not any more")
netns.setns = setns
try:
    netns.make_socket(0, socket.AF_INET)
finally:
    print("went on")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPO, capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout) == (71, "")
    assert "cannot return from a container's network namespace: [Errno 1] not any more" in done.stderr
