"""Forwards on this machine: the agent killed under load, its limit, gcsctl, and a server from Debian."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from gcsagent.host.client import Client
from gcsagent.host.dialogue import encode_params, greet
from gcsagent.host.forward import ForwardStream
from gcsagent.host.forwards import CannotListen, Wanted, kept, listening
from protocol.errors import Code, RpcError
from protocol.families.forward import OpenForward
from protocol.framing import Response
from tests.cases import forwards, servers
from tests.cases.agents import REPO, RunningAgent, eventually, stopped_clean
from tests.cases.forwards import DEAF, ECHO, TALK, TALKER
from tests.cases.target import MIB, Target, connect, expect, refused

pytestmark = pytest.mark.timeout(180)
KILLS = 25
LIMIT = 5


@pytest.fixture(scope="module")
def own_agent() -> Iterator[RunningAgent]:
    yield from stopped_clean(RunningAgent("--log-level", "info", f"--max-forwards={LIMIT}"))


@pytest.fixture
def own(own_agent: RunningAgent, rootfs: str) -> Iterator[Target]:
    before = own_agent.holdings()
    yield Target(own_agent.address, rootfs, box="", pace=3.0, execs=1)
    own_agent.assert_holds(before)


def test_the_agent_is_killed_under_load(own: Target, own_agent: RunningAgent) -> None:
    """Each byte once and in order, both ways, both ends told; a stalled one and an idle one as well."""

    async def body() -> None:
        async with await connect(own) as client, forwards.serving(own, client) as server:
            where = server.container
            idle = await ForwardStream.open(client, OpenForward(where, path="/run/servers/echo"))
            deaf = await ForwardStream.open(client, OpenForward(where, DEAF))
            talker = await ForwardStream.open(client, OpenForward(where, TALKER))
            async with (
                idle,
                deaf,
                talker,
                forwards.forwarding(client, OpenForward(where, ECHO)) as (port, errors),
            ):
                flood = asyncio.create_task(deaf.write(bytes(64 * MIB)))
                load = asyncio.create_task(_load(port))
                for _ in range(KILLS):
                    await asyncio.to_thread(own_agent.kill_agent)
                load.cancel()
                rounds = await asyncio.gather(load, return_exceptions=True)
                assert isinstance(rounds[0], asyncio.CancelledError), (rounds, errors)
                assert not flood.done()
                flood.cancel()
                assert await forwards.read_all(talker) == bytes(TALK)
                await asyncio.to_thread(own_agent.kill_agent)
                await talker.write(bytes(1000))
                await talker.close_write()
                await expect(server.streams["stdout"], b"counted 1000\n")
                await idle.write(b"after all that")
                assert await idle.read() == b"after all that"
                await idle.close_write()
                await asyncio.to_thread(own_agent.kill_agent)
                assert await forwards.read_all(idle) == b"bye"
                assert not errors

    asyncio.run(body())


async def _load(port: int) -> None:
    while True:
        await forwards.ask_echo(port, os.urandom(4 * MIB))


def test_the_limit(own: Target) -> None:
    """Those that are closed make room; one too many is told which limit it is."""

    async def body() -> None:
        async with await connect(own) as client, forwards.serving(own, client) as server:
            to = OpenForward(server.container, ECHO)
            for _ in range(2):
                async with contextlib.AsyncExitStack() as stack:
                    for _ in range(LIMIT):
                        await stack.enter_async_context(await ForwardStream.open(client, to))
                    with pytest.raises(RpcError) as caught:
                        await ForwardStream.open(client, to)
                    assert caught.value.code is Code.RESOURCE_EXHAUSTED
                    assert caught.value.details == {"limit": "max_forwards", "value": LIMIT}
                await _all_closed(client, to)

    asyncio.run(body())


async def _all_closed(client: Client, to: OpenForward) -> None:
    """The agent has seen it: there is room."""
    async with asyncio.timeout(10):
        while True:
            with contextlib.suppress(RpcError):
                async with await ForwardStream.open(client, to):
                    return


def test_a_server_that_never_answers_meets_the_deadline(own: Target) -> None:
    """A listener whose queue is full drops what else comes; TCP would try for two minutes."""

    async def body() -> None:
        with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
            port = full.getsockname()[1]
            with contextlib.ExitStack() as stack:
                for _ in range(3):
                    filler = stack.enter_context(socket.socket())
                    filler.setblocking(False)
                    filler.connect_ex(("127.0.0.1", port))
                async with await connect(own) as client:
                    with refused(Code.DEADLINE_EXCEEDED):
                        await _open_within(client, OpenForward(port=port), 500)
                    assert (await client.ping()).generation
                    with pytest.raises(TimeoutError):  # and the attempt of a client that leaves is ended
                        async with asyncio.timeout(0.2):
                            await ForwardStream.open(client, OpenForward(port=port))

    asyncio.run(body())


async def _open_within(client: Client, to: OpenForward, milliseconds: int) -> None:
    dialogue, _ = await greet(client.address, timeout=5, client_name="t")
    try:
        params = encode_params("forward.open", to, deadline=milliseconds / 1000)
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(dialogue.sock, dialogue.connection.request(9, "forward.open", params))
        [answer] = dialogue.connection.receive(await loop.sock_recv(dialogue.sock, 65536))
        assert isinstance(answer, Response)
        raise RpcError.from_wire(answer.error)
    finally:
        dialogue.close()


# -- gcsctl -----------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def gcsctl(address: str, *words: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """``gcsctl forward``, ended by Ctrl-C: status 0, nothing more to say."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gcsagent.host", "--address", address, *words),
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        yield process
        process.send_signal(signal.SIGINT)
        rest = await asyncio.wait_for(process.communicate(), 10)
        assert (process.returncode, *rest) == (0, b"", b"")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def _line(stream: asyncio.StreamReader | None) -> str:
    assert stream is not None
    return (await asyncio.wait_for(stream.readline(), 10)).decode()


def test_gcsctl_forwards_until_interrupted(own: Target, tmp_path: Path) -> None:
    path = tmp_path / "echo.sock"

    async def body() -> None:
        async with await connect(own) as client, forwards.serving(own, client) as server:
            where = server.container
            words = (f"0:{where}:{ECHO}", f"{path}:{where}:/run/servers/echo", f"[::1]:0:{where}:1")
            async with gcsctl(own.address, "forward", *words) as process:
                here, arrow, there = (await _line(process.stdout)).split()
                assert (here.startswith("127.0.0.1:"), arrow, there) == (True, "->", f"{where}:{ECHO}")
                assert await _line(process.stdout) == f"{path} -> {where}:/run/servers/echo\n"
                refused = (await _line(process.stdout)).split()[0]
                await forwards.ask_echo(int(here.rpartition(":")[2]), b"through gcsctl")
                reader, writer = await asyncio.open_unix_connection(path)
                writer.write(b"and this")
                writer.write_eof()
                assert await reader.read() == b"and thisbye"
                writer.close()
                reader, writer = await asyncio.open_connection("::1", int(refused.rpartition(":")[2]))
                with pytest.raises(ConnectionResetError):
                    await reader.read()
                writer.close()
                said = await _line(process.stderr)
                assert said.startswith(f"gcsctl: {where}:1: cannot connect to 127.0.0.1:1 in container")
                await forwards.ask_echo(int(here.rpartition(":")[2]), b"and goes on")
            assert not path.exists()

    asyncio.run(body())


def test_gcsctl_says_it_in_json(own: Target) -> None:
    async def body() -> None:
        async with gcsctl(own.address, "--json", "forward", "0:nobody:80") as process:
            told = json.loads(await _line(process.stdout))
            assert (told["event"], told["local"]["address"]) == ("listening", "127.0.0.1")
            assert (told["target"]["container"], told["target"]["port"]) == ("nobody", 80)
            _, writer = await asyncio.open_connection("127.0.0.1", told["local"]["port"])
            error = json.loads(await _line(process.stderr))
            assert (error["event"], error["code"]) == ("error", "NOT_FOUND")
            writer.close()

    asyncio.run(body())


def test_gcsctl_cannot_listen(own: Target, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for where in (str(port), "/no/such/directory/s"):
            done = subprocess.run(
                [sys.executable, "-m", "gcsagent.host", "--address", own.address, "forward", f"{where}:x:1"],
                cwd=REPO,
                capture_output=True,
                timeout=20,
                check=False,
            )
            assert (done.returncode, done.stdout) == (125, b"")
            assert done.stderr.startswith(b"gcsctl: cannot listen on ")
            assert done.stderr.count(b"\n") == 1


# -- a real server ----------------------------------------------------------------------------------


def test_redis_serves_its_own_benchmark(agent: RunningAgent, rootfs: str) -> None:
    before = agent.holdings()
    target = Target(agent.address, rootfs, box="", pace=1.0, execs=1)
    print(asyncio.run(servers.redis_under_load(target, rootfs, servers.FULL)))
    assert eventually(lambda: not agent.holdings().differences(before)), agent.holdings().differences(before)


def test_forwards_that_are_kept_as_they_are_written(own: Target, tmp_path: Path) -> None:
    """As by a VM's keeper: each says where it listens, and all are gone at the end, after a failure, too."""
    path = tmp_path / "echo"

    async def body() -> None:
        async with await connect(own) as client, forwards.serving(own, client) as server:
            words = (f"0:{server.container}:{ECHO}", f"{path}:{server.container}:/run/servers/echo")
            with listening(parsed(*words)) as sockets:
                early = [await connected_to(listener) for _, listener in sockets]
                async with kept(own.address, sockets) as (port, unix):
                    address, _, target = port.partition(" -> ")
                    assert target == f"{server.container}:{ECHO}"
                    assert unix == f"{path} -> {server.container}:/run/servers/echo"
                    for reader, writer in [*early, *[await connected_to(each) for _, each in sockets]]:
                        writer.write(b"hello")
                        writer.write_eof()
                        assert await reader.read() == b"hellobye"
                        writer.close()
                        await writer.wait_closed()
                    taken = parsed(f"{path}2:{server.container}:80", f"{address}:{server.container}:{ECHO}")
                    in_use = r"cannot listen on 127\.0\.0\.1:.*in use"
                    with pytest.raises(CannotListen, match=in_use), listening(taken):
                        pass
            assert list(tmp_path.iterdir()) == []

    asyncio.run(body())


def parsed(*words: str) -> list[Wanted]:
    return [Wanted.parse(each) for each in words]


async def connected_to(listener: socket.socket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to what listens there, served already or not yet."""
    name = listener.getsockname()
    return await (
        asyncio.open_unix_connection(name) if isinstance(name, str) else asyncio.open_connection(*name)
    )
