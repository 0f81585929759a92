"""Streams: who may attach, where they stand, when they end, and that they leave nothing held or open."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import termios
import tty
from collections.abc import Awaitable, Callable

import pytest

from gcsagent.agent import attachable
from gcsagent.agent.attachable import Keeper, NullStream
from gcsagent.agent.counters import CounterSlots
from gcsagent.agent.streams import InputStream, OutputStream
from gcsagent.agent.terminal import TtyStream
from protocol.errors import Code, RpcError
from tests.fakes import watched_loop
from tests.fakes.fake_supervisor import FakeSupervisor, pair

REPLY = b"<reply>"


class Bench:
    """A keeper over a fake supervisor, and the ends that streams told."""

    def __init__(self, counters: CounterSlots) -> None:
        self.supervisor = FakeSupervisor()
        self.keeper = Keeper(self.supervisor.client, counters)
        self.ends: list[int] = []
        self._open: list[int] = []

    def output(self) -> tuple[OutputStream, int]:
        """A stdout, and the process's end of it."""
        read_end, write_end = os.pipe()
        self.supervisor.client.hold("fd/c/p/stdout", read_end)
        slot = self.keeper.counters.allocate()
        return OutputStream(self.keeper, "fd/c/p/stdout", read_end, slot, self.ends.append), write_end

    def input(self, once: bool = False) -> tuple[InputStream, int]:
        """A stdin, and the process's end of it (non-blocking)."""
        read_end, write_end = os.pipe()
        os.set_blocking(read_end, False)
        self.supervisor.client.hold("fd/c/p/stdin", write_end)
        slot = self.keeper.counters.allocate()
        return InputStream(self.keeper, "fd/c/p/stdin", write_end, slot, self.ends.append, once), read_end

    def terminal(self) -> tuple[TtyStream, int]:
        """A TTY, and the process's end of it (non-blocking, raw)."""
        master, slave = os.openpty()
        tty.setraw(slave)
        os.set_blocking(slave, False)
        self.supervisor.client.hold("fd/c/p/tty", master)
        slots = (self.keeper.counters.allocate(), self.keeper.counters.allocate())
        return TtyStream(self.keeper, "fd/c/p/tty", master, slots, self.ends.append), slave

    async def settle(self) -> None:
        for _ in range(100):
            await asyncio.sleep(0)

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not holds():  # noqa: ASYNC110 - the kernel makes it hold
                await asyncio.sleep(0)


def on_bench(body: Callable[[Bench], Awaitable[None]]) -> None:
    """Runs ``body``; afterwards nothing may be held or open that it did not open itself."""

    async def scenario() -> None:
        counters = CounterSlots()
        gc.collect()  # what an earlier test left to it must not go in the middle of this one
        before = sorted(os.listdir("/proc/self/fd"))
        bench = Bench(counters)
        await body(bench)
        await bench.settle()
        assert bench.supervisor.held == {}
        bench.supervisor.close()
        await asyncio.sleep(0)
        assert sorted(os.listdir("/proc/self/fd")) == before

    watched_loop.run(scenario())


async def read(sock: socket.socket, count: int) -> bytes:
    data = b""
    async with asyncio.timeout(10):
        while len(data) < count:
            chunk = await asyncio.get_running_loop().sock_recv(sock, count - len(data))
            assert chunk, f"end of file after {data!r}"
            data += chunk
    return data


async def closed(sock: socket.socket) -> None:
    async with asyncio.timeout(10):
        while await asyncio.get_running_loop().sock_recv(sock, 4096):
            pass


def take(fd: int) -> bytes:
    try:
        return os.read(fd, 1 << 20)
    except BlockingIOError:
        return b""


async def to_the_end(bench: Bench, fd: int) -> bytes:
    """What a process reads until end of file, which comes when the last holder has let go."""
    data, ended = b"", False

    def step() -> bool:
        nonlocal data, ended
        try:
            chunk = os.read(fd, 1 << 20)
        except BlockingIOError:
            return False
        data, ended = data + chunk, not chunk
        return ended

    await bench.until(step)
    return data


# -- output -----------------------------------------------------------------------------------------


def test_output_follows_the_reply_and_is_counted_over_attachments() -> None:
    async def body(bench: Bench) -> None:
        stream, process = bench.output()
        os.write(process, b"before")
        assert (stream.produced(), stream.state().bytes) == (6, 0)
        ours, theirs = pair()
        assert stream.check_attachable(False) == 0
        stream.attach(ours, False, REPLY)
        assert await read(theirs, 13) == b"<reply>before"
        theirs.close()
        await bench.until(lambda: not stream.attached)
        os.write(process, b"between")
        ours, theirs = pair()
        assert stream.check_attachable(False) == 6
        stream.attach(ours, False, REPLY)
        assert await read(theirs, 14) == b"<reply>between"
        os.close(process)
        await bench.until(lambda: bench.ends == [13])
        assert (stream.state().bytes, stream.state().ended, stream.produced()) == (13, True, 13)
        theirs.close()
        await bench.until(lambda: not stream.attached)
        stream.close()

    on_bench(body)


@pytest.mark.parametrize("kind", ["output", "input", "terminal"])
def test_a_client_whose_connection_cannot_be_held_is_refused(kind: str) -> None:
    async def body(bench: Bench) -> None:
        stream, process = getattr(bench, kind)()
        await bench.settle()
        held = set(bench.supervisor.held)
        bench.supervisor.full = True
        ours, theirs = pair()
        stream.attach(ours, False, REPLY, refusal=b"<no>")
        assert stream.attached, "nobody else may come between"
        with pytest.raises(BlockingIOError):
            theirs.recv(1)  # nothing is said before the supervisor has answered
        assert await read(theirs, 4) == b"<no>"
        await closed(theirs)
        theirs.close()
        assert not stream.attached
        await bench.settle()
        assert set(bench.supervisor.held) == held
        bench.supervisor.full = False
        ours, theirs = pair()
        stream.attach(ours, False, REPLY)
        assert await read(theirs, len(REPLY)) == REPLY
        theirs.close()
        os.close(process)
        stream.close()

    on_bench(body)


def test_a_second_client_is_refused_unless_it_takes_over() -> None:
    async def body(bench: Bench) -> None:
        stream, process = bench.output()
        first, its_peer = pair()
        stream.attach(first, False, REPLY)
        os.write(process, b"one")
        assert await read(its_peer, 10) == b"<reply>one"
        second, other_peer = pair()
        with pytest.raises(RpcError, match="take") as caught:
            stream.attach(second, False, REPLY)
        assert caught.value.code is Code.FAILED_PRECONDITION
        assert stream.check_attachable(True) == 3
        stream.attach(second, True, REPLY)
        await closed(its_peer)
        os.write(process, b"two")
        assert await read(other_peer, 10) == b"<reply>two"
        os.close(process)
        stream.close()
        await closed(other_peer)
        its_peer.close()
        other_peer.close()

    on_bench(body)


def test_what_a_client_sends_to_an_output_is_dropped() -> None:
    async def body(bench: Bench) -> None:
        stream, process = bench.output()
        ours, theirs = pair()
        stream.attach(ours, False, REPLY)
        theirs.send(b"not for anybody" * 100)
        os.write(process, b"on it goes")
        assert await read(theirs, 17) == b"<reply>on it goes"
        theirs.close()
        await bench.until(lambda: not stream.attached)
        os.close(process)
        stream.close()

    on_bench(body)


def test_a_client_that_stays_after_the_end_is_let_go_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attachable, "LINGER_SECONDS", 0.05)

    async def body(bench: Bench) -> None:
        stream, process = bench.output()
        ours, theirs = pair()
        stream.attach(ours, False, REPLY)
        os.write(process, b"x")
        os.close(process)
        await bench.until(lambda: bench.ends == [1])
        assert stream.attached  # the client counts, and closes first if it can
        await closed(theirs)
        assert not stream.attached
        theirs.close()
        late, its_peer = pair()
        stream.attach(late, False, REPLY)
        assert await read(its_peer, 7) == REPLY
        await closed(its_peer)
        its_peer.close()
        assert bench.ends == [1]
        stream.close()

    on_bench(body)


def test_a_client_that_does_not_read_stops_the_process_and_nothing_else() -> None:
    async def body(bench: Bench) -> None:
        stream, process = bench.output()
        ours, theirs = pair()
        stream.attach(ours, False, REPLY)
        os.set_blocking(process, False)
        written, full = 0, 0
        while full < 3:
            try:
                written += os.write(process, b"x" * 65_536)
                full = 0
            except BlockingIOError:
                full += 1
                await bench.settle()
        assert stream.produced() == written
        assert (await read(theirs, written + 7))[7:] == b"x" * written
        os.close(process)
        await bench.until(lambda: bench.ends == [written])
        theirs.close()
        stream.close()

    on_bench(body)


def test_closing_twice_gives_the_counter_back_once() -> None:
    async def body(bench: Bench) -> None:
        stream, process = bench.output()
        slot = stream._slot
        stream.close()
        os.close(process)
        assert bench.keeper.counters.allocate() == slot
        stream.close()
        assert bench.keeper.counters.allocate() != slot

    on_bench(body)


# -- input ------------------------------------------------------------------------------------------


def test_input_ends_where_it_was_told_to_before_the_bytes_came() -> None:
    async def body(bench: Bench) -> None:
        stream, process = bench.input()
        stream.close_input(8)
        assert stream.closing_at() == 8
        ours, theirs = pair()
        stream.attach(ours, False, REPLY)
        theirs.send(b"1234")
        await bench.until(lambda: stream.state().bytes == 4)
        assert not stream.ended
        theirs.send(b"5678")
        await bench.until(lambda: bench.ends == [8])
        assert await to_the_end(bench, process) == b"12345678"
        assert await read(theirs, 7) == REPLY
        await closed(theirs)
        assert stream.closing_at() is None
        theirs.close()
        os.close(process)
        stream.close()
        assert bench.ends == [8]

    on_bench(body)


@pytest.mark.parametrize("offset", [None, 4, 3, 0])
def test_input_ends_at_once_when_the_bytes_have_come_already(offset: int | None) -> None:
    async def body(bench: Bench) -> None:
        stream, process = bench.input()
        ours, theirs = pair()
        stream.attach(ours, False, REPLY)
        theirs.send(b"1234")
        await bench.until(lambda: stream.state().bytes == 4)
        stream.close_input(offset)
        stream.close_input(offset)
        assert (stream.ended, bench.ends) == (True, [4])
        assert await to_the_end(bench, process) == b"1234"
        theirs.close()
        os.close(process)
        stream.close()

    on_bench(body)


def test_input_larger_than_the_pipe_ends_when_the_last_of_it_is_taken() -> None:
    async def body(bench: Bench) -> None:
        stream, process = bench.input()
        ours, theirs = pair()
        stream.attach(ours, False, REPLY)
        data = os.urandom(700_000)
        stream.close_input(len(data))
        sending = asyncio.create_task(asyncio.get_running_loop().sock_sendall(theirs, data))
        received = b""

        def step() -> bool:
            nonlocal received
            received += take(process)
            return bench.ends == [len(data)]

        await bench.until(step)
        await sending
        assert received + await to_the_end(bench, process) == data
        theirs.close()
        os.close(process)
        stream.close()

    on_bench(body)


@pytest.mark.parametrize("once", [True, False])
def test_a_client_that_leaves_ends_input_only_if_asked_for(once: bool) -> None:
    async def body(bench: Bench) -> None:
        stream, process = bench.input(once)
        ours, theirs = pair()
        stream.attach(ours, False, REPLY)
        await read(theirs, len(REPLY))
        theirs.send(b"bye")
        theirs.close()
        await bench.until(lambda: not stream.attached)
        assert stream.ended is once
        if once:
            assert await to_the_end(bench, process) == b"bye"
            assert bench.ends == [3]
        else:
            assert take(process) == b"bye"
            again, other = pair()
            assert stream.check_attachable(False) == 3
            stream.attach(again, False, REPLY)
            other.send(b"!")
            await bench.until(lambda: take(process) == b"!")
            other.close()
        os.close(process)
        stream.close()

    on_bench(body)


def test_a_process_that_closes_its_stdin_or_ends_lets_the_client_go() -> None:
    async def body(bench: Bench) -> None:
        stream, process = bench.input()
        ours, theirs = pair()
        stream.attach(ours, False, REPLY)
        os.close(process)
        theirs.send(b"x")
        await bench.until(lambda: bench.ends == [0])
        theirs.close()
        stream.process_ended()
        stream.close()
        assert bench.ends == [0]

    on_bench(body)


def test_what_the_process_left_unread_when_it_ended_is_not_waited_for() -> None:
    async def body(bench: Bench) -> None:
        stream, process = bench.input()
        ours, theirs = pair()
        stream.attach(ours, False, REPLY)
        theirs.send(b"x" * 100)
        await bench.until(lambda: stream.produced() == 100)
        stream.process_ended()
        assert bench.ends == [100]
        await closed(theirs)
        theirs.close()
        os.close(process)
        stream.close()

    on_bench(body)


# -- terminals --------------------------------------------------------------------------------------


def test_a_terminal_goes_both_ways_on_one_connection_until_it_hangs_up() -> None:
    async def body(bench: Bench) -> None:
        stream, process = bench.terminal()
        ours, theirs = pair()
        stream.attach(ours, False, REPLY)
        os.write(process, b"$ ")
        assert await read(theirs, 9) == b"<reply>$ "
        theirs.send(b"ls\r")
        await bench.until(lambda: take(process) == b"ls\r")
        os.write(process, b"last words")
        os.close(process)
        assert await read(theirs, 10) == b"last words"
        # The program has closed its terminal, and lives: it must not be hung up on its way out.
        stream.resize(12, 34)
        assert bench.ends == []
        stream.process_ended()
        await bench.until(lambda: bench.ends == [12])
        with pytest.raises(RpcError, match="has ended"):
            stream.resize(1, 1)
        theirs.close()
        await bench.until(lambda: not stream.attached)
        stream.close()
        stream.close()

    on_bench(body)


def test_a_terminal_is_resized_and_told_where_input_ends() -> None:
    async def body(bench: Bench) -> None:
        stream, process = bench.terminal()
        stream.resize(11, 22)
        assert termios.tcgetwinsize(process) == (11, 22)
        ours, theirs = pair()
        stream.attach(ours, False, REPLY)
        stream.close_input(3)
        theirs.send(b"abc")
        typed = b""

        def step() -> bool:
            nonlocal typed
            typed += take(process)
            return typed == b"abc\x04"

        await bench.until(step)
        stream.close_input(None)
        await bench.until(lambda: take(process) == b"\x04")
        theirs.close()
        await bench.until(lambda: not stream.attached)
        os.close(process)
        stream.close()

    on_bench(body)


def test_a_terminals_client_comes_and_goes_and_the_program_stays() -> None:
    async def body(bench: Bench) -> None:
        stream, process = bench.terminal()
        offset = 0
        for text in (b"one", b"three", b"five"):
            ours, theirs = pair()
            assert stream.check_attachable(False) == offset
            stream.attach(ours, False, REPLY)
            os.write(process, text)
            assert await read(theirs, 7 + len(text)) == REPLY + text
            offset += len(text)
            theirs.close()
            await bench.until(lambda: not stream.attached)
        os.close(process)
        stream.close()

    on_bench(body)


# -- null -------------------------------------------------------------------------------------------


def test_nothing_attaches_to_null() -> None:
    stream = NullStream()
    with pytest.raises(RpcError, match="this stream is null"):
        stream.check_attachable(True)
    stream.close_input(None)
    assert (stream.state().ended, stream.produced()) == (True, 0)
