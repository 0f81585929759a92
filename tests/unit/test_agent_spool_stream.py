"""Spooled streams: filled whoever reads, read at any offset, and taken up again after any death."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from gcsagent.agent import attachable, spool_stream
from gcsagent.agent.attachable import Attachment, Keeper
from gcsagent.agent.counters import CounterSlots
from gcsagent.agent.spool import Spool, make_file
from gcsagent.agent.spool_index import SpoolIndex
from gcsagent.agent.spool_stream import MAX_READERS, SpoolStream
from protocol.errors import Code, RpcError
from protocol.types import StreamMode, StreamSpec, WhenFull
from tests.cases.descriptors import descriptors, settled_descriptors
from tests.fakes import watched_loop
from tests.fakes.fake_supervisor import FakeSupervisor, pair

REPLY = b"<reply>"
NAME = "fd/c/p/stdout"
LIMIT = 1 << 16


class Killed(BaseException):
    """What an agent does not survive."""


class Bench:
    """A supervisor that holds what a spool needs, and one agent after the other with it."""

    def __init__(self, directory: Path, when_full: WhenFull, counters: CounterSlots) -> None:
        self.supervisor = FakeSupervisor()
        self.counters = counters
        self.slot = counters.allocate()
        self.spec = StreamSpec(StreamMode.SPOOL, LIMIT, when_full)
        self.ends: list[int] = []
        source, self.process = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        file, index = make_file(str(directory)), SpoolIndex()
        for suffix, fd in (("", source), (".file", file), (".index", index.fd)):
            self.supervisor.held[NAME + suffix] = os.dup(fd)
        os.close(source)
        os.close(file)
        index.close()
        self.stream = self.start()

    def start(self) -> SpoolStream:
        """What an agent does with what it finds held."""
        held = {
            name.removeprefix(NAME).removeprefix("."): os.dup(fd) for name, fd in self.supervisor.held.items()
        }
        spool = Spool(held.pop("file"), self.counters, self.slot)
        index, keeper = SpoolIndex(held.pop("index")), Keeper(self.supervisor.client, self.counters)
        source = held.pop("", -1)
        stream = SpoolStream(keeper, NAME, source, spool, index, self.spec, self.slot, self.ends.append)
        stream.restore(held)
        return stream

    async def die(self) -> None:
        """The agent goes as by SIGKILL: what it has told arrives, and its descriptors are closed."""
        loop, stream = asyncio.get_running_loop(), self.stream
        await settle()
        for reader in stream._readers:
            connection, reader._connection = reader._connection, None
            if reader._linger is not None:
                reader._linger.cancel()
            if connection is not None:
                loop.remove_reader(connection)
                loop.remove_writer(connection)
                connection.close()
            for fd in (reader._fd, reader._reply):
                if fd >= 0:
                    os.close(fd)
        if stream._retry is not None:
            stream._retry.cancel()
        if stream._fd >= 0:
            loop.remove_reader(stream._fd)
            os.close(stream._fd)
        os.close(stream.spool.fd)
        stream.index.close()

    async def restart(self) -> None:
        await self.die()
        self.stream = self.start()

    def attach(self, offset: int | None = None) -> socket.socket:
        """As the session does; the client's end."""
        start = self.stream.check_attachable(False, offset)
        ours, theirs = pair()
        self.stream.attach(Attachment(ours, REPLY, offset=start))
        return theirs

    async def write(self, data: bytes) -> None:
        """All of it, as a process does that has nothing else to do."""
        async with asyncio.timeout(10):
            while data:
                try:
                    data = data[os.write(self.process, data) :]
                except BlockingIOError:
                    await asyncio.sleep(0)

    def finish(self) -> None:
        os.close(self.process)
        self.process = -1


async def settle() -> None:
    for _ in range(60):
        await asyncio.sleep(0)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110 - the kernel makes it hold
            await asyncio.sleep(0)


def on_bench(
    directory: Path, body: Callable[[Bench], Awaitable[None]], when_full: WhenFull = WhenFull.BLOCK
) -> None:
    """Runs ``body``, closes the stream; afterwards nothing may be held or open."""

    async def scenario() -> None:
        counters = CounterSlots()
        before = settled_descriptors()
        bench = Bench(directory, when_full, counters)
        await body(bench)
        bench.stream.close()
        bench.stream.close()
        if bench.process >= 0:
            os.close(bench.process)
        await until(lambda: not bench.supervisor.held)
        assert counters.allocate() == bench.slot
        bench.supervisor.close()
        await asyncio.sleep(0)
        assert descriptors() == before

    watched_loop.run(scenario())


async def read(sock: socket.socket, count: int) -> bytes:
    data = b""
    async with asyncio.timeout(10):
        while len(data) < count:
            chunk = await asyncio.get_running_loop().sock_recv(sock, count - len(data))
            assert chunk, f"end of file after {len(data)} bytes"
            data += chunk
    return data


async def to_the_end(sock: socket.socket) -> bytes:
    data = b""
    async with asyncio.timeout(10):
        with contextlib.suppress(ConnectionResetError):
            while chunk := await asyncio.get_running_loop().sock_recv(sock, 65536):
                data += chunk
    return data


# -- block --------------------------------------------------------------------------------------------


def test_it_fills_while_nobody_reads_and_blocks_at_the_limit(tmp_path: Path) -> None:
    data = random.Random(1).randbytes(LIMIT + 1000)

    async def body(bench: Bench) -> None:
        await bench.write(data)
        await until(lambda: bench.stream.spool.written == LIMIT)
        assert bench.stream.produced() == LIMIT + 1000
        assert bench.stream.state().first == 0
        with bench.attach(1000) as client:
            assert await read(client, LIMIT - 1000 + 7) == REPLY + data[1000:LIMIT]
            bench.stream.acknowledge(600)
            assert await read(client, 600) == data[LIMIT : LIMIT + 600]
            bench.finish()
            bench.stream.acknowledge(LIMIT)
            assert await read(client, 400) == data[LIMIT + 600 :]
            await until(lambda: bench.ends == [LIMIT + 1000])
            assert not bench.stream.settled()
            bench.stream.acknowledge(LIMIT + 1000)
            assert bench.stream.settled()
        await until(lambda: not bench.stream.state().attached)
        state = bench.stream.state()
        assert (state.mode, state.bytes, state.first) == (StreamMode.SPOOL, LIMIT + 1000, LIMIT + 1000)
        assert (state.ended, state.when_full) == (True, WhenFull.BLOCK)

    on_bench(tmp_path, body)


def test_offsets_that_are_not_there_are_refused_with_what_is(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        await bench.write(b"x" * 1000)
        await until(lambda: bench.stream.spool.written == 1000)
        bench.stream.acknowledge(300)
        for offset, dropped in ((0, 300), (299, 1), (1001, 0)):
            with pytest.raises(RpcError) as caught:
                bench.stream.check_attachable(False, offset)
            assert caught.value.code is Code.FAILED_PRECONDITION
            assert caught.value.details == {"first": 300, "end": 1000, "dropped": dropped}
        assert [bench.stream.check_attachable(False, offset) for offset in (None, 300, 1000)] == [
            300,
            300,
            1000,
        ]
        with pytest.raises(RpcError) as beyond:
            bench.stream.acknowledge(1001)
        assert beyond.value.details == {"end": 1000}
        with pytest.raises(RpcError):
            bench.stream.close_input(None)

    on_bench(tmp_path, body)


def test_one_client_at_a_time_unless_it_is_taken(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        await bench.write(b"hello")
        with bench.attach() as first:
            assert await read(first, 12) == REPLY + b"hello"
            with pytest.raises(RpcError, match="take"):
                bench.stream.check_attachable(False)
            assert bench.stream.check_attachable(True, 2) == 2
            ours, second = pair()
            bench.stream.attach(Attachment(ours, REPLY, take=True, offset=2))
            assert await to_the_end(first) == b""
            assert await read(second, 10) == REPLY + b"llo"
            second.close()
            await until(lambda: not bench.stream.state().attached)

    on_bench(tmp_path, body)


def test_an_attach_without_descriptors_leaves_no_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_flags: int) -> tuple[int, int]:
        raise OSError(errno.EMFILE, "too many open files")

    async def body(bench: Bench) -> None:
        ours, theirs = pair()
        monkeypatch.setattr(os, "pipe2", fail)
        with pytest.raises(OSError, match="too many"):
            bench.stream.attach(Attachment(ours, REPLY))
        monkeypatch.undo()
        ours.close()
        theirs.close()
        assert not bench.stream.state().attached
        await until(lambda: len(bench.supervisor.held) == 3)

    on_bench(tmp_path, body)


def test_a_client_is_closed_a_while_after_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attachable, "LINGER_SECONDS", 0.02)

    async def body(bench: Bench) -> None:
        await bench.write(b"bye")
        bench.finish()
        with bench.attach() as client:
            assert await to_the_end(client) == REPLY + b"bye"

    on_bench(tmp_path, body)


def test_a_full_disk_is_waited_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_stream, "RETRY_SECONDS", 0.001)
    real, failures = Spool.take, [errno.ENOSPC] * 3

    def take(spool: Spool, source: int, count: int) -> int:
        if failures:
            raise OSError(failures.pop(), "no space")
        return real(spool, source, count)

    monkeypatch.setattr(Spool, "take", take)

    async def body(bench: Bench) -> None:
        await bench.write(b"kept")
        await until(lambda: bench.stream.spool.written == 4)
        with bench.attach() as client:
            assert await read(client, 11) == REPLY + b"kept"
        await until(lambda: not bench.stream.state().attached)

    on_bench(tmp_path, body)
    assert not failures


# -- drop_oldest --------------------------------------------------------------------------------------


def test_a_log_keeps_the_newest_and_lets_go_of_who_falls_behind(tmp_path: Path) -> None:
    data = random.Random(2).randbytes(40 * LIMIT)

    async def body(bench: Bench) -> None:
        await bench.write(data[:LIMIT])
        slow = bench.attach()
        await bench.write(data[LIMIT:])
        await until(lambda: bench.stream.spool.written == len(data))
        assert bench.stream.spool.first == len(data) - LIMIT
        found = await to_the_end(slow)  # only what had been sent: then the connection ends
        assert found[7:] == data[: len(found) - 7]
        assert len(found) - 7 < len(data) - LIMIT
        slow.close()
        clients = [bench.attach(len(data) - LIMIT + 10 * number) for number in range(MAX_READERS)]
        with pytest.raises(RpcError) as caught:
            bench.attach()
        assert caught.value.code is Code.RESOURCE_EXHAUSTED
        for number, client in enumerate(clients):
            wanted = REPLY + data[len(data) - LIMIT + 10 * number :]
            assert await read(client, len(wanted)) == wanted
        bench.finish()
        await until(lambda: bench.ends == [len(data)])
        assert bench.stream.settled()
        for client in clients:
            client.close()
        await until(lambda: not bench.stream.state().attached)

    on_bench(tmp_path, body, WhenFull.DROP_OLDEST)


def test_a_tee_waits_for_its_leader_and_for_nobody_else(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        bench.spec = StreamSpec(StreamMode.SPOOL, LIMIT, tee=True)
        await bench.restart()
        ours, leader = pair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        bench.stream.attach(Attachment(ours, REPLY))
        await settle()
        along, passive = pair()
        bench.stream.attach(Attachment(along, REPLY, passive=True))
        passive.close()
        with pytest.raises(RpcError):
            bench.stream.check_attachable(False)
        data = random.Random(7).randbytes(4 * LIMIT)
        writing = asyncio.create_task(bench.write(data))
        await until(lambda: bench.stream._room() <= 0)
        await bench.restart()  # the next agent knows who leads
        assert bench.stream.state().attached
        assert bench.stream.spool.first <= bench.stream._readers[0].position
        assert await read(leader, len(REPLY) + 3 * LIMIT) == REPLY + data[: 3 * LIMIT]
        assert not bench.stream.settled()
        leader.close()  # the log is a log again
        await writing
        os.close(bench.process)
        bench.process = -1
        await until(lambda: bench.ends == [len(data)])
        assert bench.stream.settled()
        assert bench.stream.spool.first >= len(data) - LIMIT - (1 << 16)

    on_bench(tmp_path, body, WhenFull.DROP_OLDEST)


def test_a_full_disk_costs_a_log_its_older_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_stream, "RETRY_SECONDS", 0.001)

    async def body(bench: Bench) -> None:
        await bench.write(b"old " * 1000)
        await until(lambda: bench.stream.spool.written == 4000)
        real, failing = Spool.take, [True]

        def take(spool: Spool, source: int, count: int) -> int:
            if failing and failing.pop():
                raise OSError(errno.ENOSPC, "no space")
            return real(spool, source, count)

        monkeypatch.setattr(Spool, "take", take)
        await bench.write(b"new")
        await until(lambda: bench.stream.spool.written == 4003)
        assert bench.stream.spool.first == 2000

    on_bench(tmp_path, body, WhenFull.DROP_OLDEST)


# -- death --------------------------------------------------------------------------------------------


def test_the_next_agent_fills_and_reads_on_at_the_byte(tmp_path: Path) -> None:
    data = random.Random(3).randbytes(30 * LIMIT)

    async def body(bench: Bench) -> None:
        client, received, written = bench.attach(), b"", 0
        for _ in range(30):
            await bench.write(data[written : written + LIMIT - 5000])
            written += LIMIT - 5000
            await bench.restart()
            received += await read(client, written + 7 - len(received))
            bench.stream.acknowledge(written - 5000)
        assert received == REPLY + data[:written]
        bench.finish()
        await bench.restart()
        await until(lambda: bench.ends == [written])
        await bench.restart()
        assert bench.stream.ended
        assert bench.ends == [written]
        client.close()
        await until(lambda: not bench.stream.state().attached)

    on_bench(tmp_path, body)


def test_what_was_sent_to_a_slow_client_is_not_sent_again(tmp_path: Path) -> None:
    data = random.Random(4).randbytes(LIMIT)

    async def body(bench: Bench) -> None:
        ours, client = pair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        await bench.write(data)
        bench.stream.attach(Attachment(ours, REPLY))
        received = b""
        while len(received) < LIMIT + 7:
            received += await read(client, min(3000, LIMIT + 7 - len(received)))
            await bench.restart()
        assert received == REPLY + data
        client.close()
        await until(lambda: not bench.stream.state().attached)

    on_bench(tmp_path, body)


@pytest.mark.parametrize("sent", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", range(8))
def test_killed_at_any_step_of_attach_and_detach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, sent: bool
) -> None:
    """A step is a word to the supervisor: the agent dies before it has said it, or behind it."""
    data = b"0123456789" * 100

    async def body(bench: Bench) -> None:
        await bench.write(data)
        await until(lambda: bench.stream.spool.written == len(data))
        real, left = bench.supervisor.client.request, [step]

        def request(operation: str, arguments: Any, fds: tuple[int, ...] = ()) -> asyncio.Future[Any]:
            answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            if left[0] or sent:
                answer = real(operation, arguments, fds)
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return answer

        ours, theirs = pair()
        monkeypatch.setattr(bench.supervisor.client, "request", request)
        with contextlib.suppress(Killed):
            bench.stream.attach(Attachment(ours, REPLY, offset=10))
            for reader in list(bench.stream._readers):
                reader.detach()
        monkeypatch.undo()
        for reader in bench.stream._readers:
            if reader._connection is None:
                ours.close()
        await bench.restart()
        if not bench.stream._readers:
            ours.close()  # the session had it, or nobody
        await settle()
        if bench.stream.state().attached:
            assert await read(theirs, 7 + len(data) - 10) == REPLY + data[10:]
        else:
            found = await to_the_end(theirs)
            assert found == (REPLY + data[10:])[: len(found)]
        theirs.close()
        await until(lambda: not bench.stream.state().attached)
        await until(lambda: set(bench.supervisor.held) == {NAME, f"{NAME}.file", f"{NAME}.index"})

    on_bench(tmp_path, body)


def test_a_reader_that_had_fallen_behind_when_the_agent_died_is_let_go(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        await bench.write(b"a" * 1000)
        client = bench.attach()
        assert await read(client, 1007) == REPLY + b"a" * 1000
        await bench.die()
        spool = Spool(bench.supervisor.held[f"{NAME}.file"], bench.counters, bench.slot)
        await bench.write(b"b" * 1000)
        assert spool.take(bench.supervisor.held[NAME], 1000) == 1000
        spool.release(1001)
        bench.stream = bench.start()
        assert await to_the_end(client) == b""
        client.close()
        assert bench.stream.state().first == 1001

    on_bench(tmp_path, body, WhenFull.DROP_OLDEST)
