"""Streams: who may attach, where they stand, when they end, and that they leave nothing held or open."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
import termios
import tty
from collections.abc import Awaitable, Callable, Iterator

import pytest

from gcsagent.agent import attachable
from gcsagent.agent.attachable import Attachment, Keeper
from gcsagent.agent.counters import CounterSlots
from gcsagent.agent.streams import InputStream, OutputStream
from gcsagent.agent.supervisor_client import SupervisorError
from gcsagent.agent.terminal import TtyStream
from gcsagent.agent.unattachable import NullStream
from protocol.errors import Code, RpcError
from tests.cases.descriptors import descriptors, settled_descriptors
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
        before = settled_descriptors()
        bench = Bench(counters)
        await body(bench)
        await bench.settle()
        assert bench.supervisor.held == {}
        bench.supervisor.close()
        await asyncio.sleep(0)
        assert descriptors() == before

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
        stream.attach(Attachment(ours, REPLY))
        assert await read(theirs, 13) == b"<reply>before"
        theirs.close()
        await bench.until(lambda: not stream.attached)
        os.write(process, b"between")
        ours, theirs = pair()
        assert stream.check_attachable(False) == 6
        stream.attach(Attachment(ours, REPLY))
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
        stream.attach(Attachment(ours, REPLY, refusal=b"<no>"))
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
        stream.attach(Attachment(ours, REPLY))
        assert await read(theirs, len(REPLY)) == REPLY
        theirs.close()
        os.close(process)
        stream.close()

    on_bench(body)


@contextlib.contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """As many can be opened in the block, and no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = [os.open("/dev/null", os.O_RDONLY) for _ in range(count + 1)]  # the lowest there are
    for fd in free:
        os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[count], hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("kind, needs", [("output", 3), ("input", 3), ("terminal", 5)])
@pytest.mark.parametrize("left", range(5))
def test_a_client_there_are_no_descriptors_for_is_nobodys_and_the_next_is_served(
    kind: str, needs: int, left: int
) -> None:
    """One for the reply, and two for each of the stream's middle pipes."""

    async def body(bench: Bench) -> None:
        stream, process = getattr(bench, kind)()
        await bench.settle()
        ours, theirs = pair()
        none = contextlib.nullcontext() if left >= needs else pytest.raises(OSError, match="Too many")
        with none, descriptors_left(left):
            stream.attach(Attachment(ours, REPLY))
        assert stream.attached is (left >= needs)
        if not stream.attached:
            stream.attach(Attachment(ours, REPLY))
        assert await read(theirs, len(REPLY)) == REPLY
        theirs.close()
        os.close(process)
        stream.close()

    on_bench(body)


def test_a_second_client_is_refused_unless_it_takes_over() -> None:
    async def body(bench: Bench) -> None:
        stream, process = bench.output()
        first, its_peer = pair()
        stream.attach(Attachment(first, REPLY))
        os.write(process, b"one")
        assert await read(its_peer, 10) == b"<reply>one"
        second, other_peer = pair()
        with pytest.raises(RpcError, match="take") as caught:
            stream.attach(Attachment(second, REPLY))
        assert caught.value.code is Code.FAILED_PRECONDITION
        assert stream.check_attachable(True) == 3
        stream.attach(Attachment(second, REPLY, take=True))
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
        stream.attach(Attachment(ours, REPLY))
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
        stream.attach(Attachment(ours, REPLY))
        os.write(process, b"x")
        os.close(process)
        await bench.until(lambda: bench.ends == [1])
        assert stream.attached  # the client counts, and closes first if it can
        await closed(theirs)
        assert not stream.attached
        theirs.close()
        late, its_peer = pair()
        stream.attach(Attachment(late, REPLY))
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
        stream.attach(Attachment(ours, REPLY))
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
        stream.attach(Attachment(ours, REPLY))
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
        stream.attach(Attachment(ours, REPLY))
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
        stream.attach(Attachment(ours, REPLY))
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
        stream.attach(Attachment(ours, REPLY))
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
            stream.attach(Attachment(again, REPLY))
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
        stream.attach(Attachment(ours, REPLY))
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
        stream.attach(Attachment(ours, REPLY))
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
        stream.attach(Attachment(ours, REPLY))
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
        stream.attach(Attachment(ours, REPLY))
        stream.type_end(3)
        theirs.send(b"abc")
        typed = b""

        def step() -> bool:
            nonlocal typed
            typed += take(process)
            return typed == b"abc\x04"

        await bench.until(step)
        stream.type_end(None)
        await bench.until(lambda: take(process) == b"\x04")
        theirs.close()
        await bench.until(lambda: not stream.attached)
        os.close(process)
        stream.close()

    on_bench(body)


async def typed(bench: Bench, process: int, count: int) -> bytes:
    """What a program reads of its terminal, until there are so many bytes."""
    found = b""

    def step() -> bool:
        nonlocal found
        found += take(process)
        return len(found) >= count

    await bench.until(step)
    return found


async def full(bench: Bench, stream: TtyStream, client: socket.socket) -> int:
    """Sends until the stream takes no more, and types what there is room for beside that; returns how much.

    The kernel makes room without saying so (flush_to_ldisc): that is what typing on finds.
    """
    count = refused = 0

    def step() -> bool:
        nonlocal count, refused
        try:
            count += client.send(b"x" * 65_536)
        except BlockingIOError:
            refused += 1
        if refused and stream._input is not None and stream._input.waits_for_sink:
            with contextlib.suppress(BlockingIOError):
                count, refused = count + os.write(stream._fd, b"x" * 4096), 0
        return refused > 100

    await bench.until(step)
    return count


@pytest.mark.parametrize("leaves", [False, True])
def test_an_end_asked_for_while_the_terminal_is_full_is_typed_and_so_is_the_rest(leaves: bool) -> None:
    """Both wait for the same thing, room in the terminal."""

    async def body(bench: Bench) -> None:
        stream, process = bench.terminal()
        ours, theirs = pair()
        stream.attach(Attachment(ours, REPLY))
        await read(theirs, len(REPLY))
        count = await full(bench, stream, theirs)
        stream.type_end(None)
        await bench.settle()
        if leaves:
            stream.detach()
            found = b""
            while not found.endswith(b"\x04"):
                found += await typed(bench, process, 1)
            assert found.strip(b"x") == b"\x04"
        else:
            found = await typed(bench, process, count + 1)
            assert (found.count(b"x"), found.count(b"\x04")) == (count, 1)
        theirs.close()
        os.close(process)
        stream.close()

    on_bench(body)


def test_an_end_that_waits_for_room_goes_with_the_terminal() -> None:
    async def body(bench: Bench) -> None:
        stream, process = bench.terminal()
        ours, theirs = pair()
        stream.attach(Attachment(ours, REPLY))
        await full(bench, stream, theirs)
        stream.detach()
        theirs.close()
        stream.type_end(None)
        await bench.settle()
        os.close(process)
        stream.process_ended()
        stream.close()

    on_bench(body)


@pytest.mark.parametrize("before", [False, True])
def test_a_successor_types_an_end_that_has_not_been_typed_and_no_other(before: bool) -> None:
    async def body(bench: Bench) -> None:
        counters = bench.keeper.counters
        dead, process = bench.terminal()
        ours, theirs = pair()
        dead.attach(Attachment(ours, REPLY))
        dead.type_end(3, "asked")
        theirs.send(b"abc" if before else b"ab")
        assert await typed(bench, process, 4 if before else 2) == (b"abc\x04" if before else b"ab")
        # It is killed: what it held is the successor's, and nothing else is left of it.
        held = {
            name.partition(".")[2]: os.dup(fd)
            for name, fd in bench.supervisor.held.items()
            if name.startswith("fd/c/p/tty")
        }
        dead._stop()
        dead._loop.remove_reader(ours.fileno())
        successor = TtyStream(
            Keeper(bench.supervisor.client, counters), dead._name, held.pop(""), dead._slots, print
        )
        successor.restore(held)
        successor.type_end(3, "asked")  # its answer had been lost
        if not before:
            theirs.send(b"c")
            assert await typed(bench, process, 2) == b"c\x04"
        theirs.send(b"d")
        assert await typed(bench, process, 1) == b"d"
        successor.type_end(4, "another")
        assert await typed(bench, process, 1) == b"\x04"
        theirs.close()
        await bench.until(lambda: not successor.attached)
        os.close(process)
        successor.close()
        for fd in (dead._fd, dead._eof.fd if dead._eof is not None else -1):
            os.close(fd)
        for middle, _ in dead._middles:
            middle.close()
        ours.close()

    on_bench(body)


def test_the_end_that_is_typed_is_what_the_terminal_has_for_it_then() -> None:
    async def body(bench: Bench) -> None:
        stream, process = bench.terminal()
        ours, theirs = pair()
        stream.attach(Attachment(ours, REPLY))
        stream.type_end(1)
        await bench.settle()
        settings = termios.tcgetattr(process)
        settings[6][termios.VEOF] = b"\x18"
        termios.tcsetattr(process, termios.TCSANOW, settings)
        theirs.send(b"a")
        assert await typed(bench, process, 2) == b"a\x18"
        theirs.close()
        await bench.until(lambda: not stream.attached)
        os.close(process)
        stream.close()

    on_bench(body)


def test_an_end_that_cannot_be_held_is_refused_and_not_typed() -> None:
    async def body(bench: Bench) -> None:
        stream, process = bench.terminal()
        await bench.settle()
        bench.supervisor.full = True
        holding = stream.type_end(None)
        assert holding is not None
        with pytest.raises(SupervisorError):
            await holding
        bench.supervisor.full = False
        assert take(process) == b""
        stream.type_end(None)
        assert await typed(bench, process, 1) == b"\x04"
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
            stream.attach(Attachment(ours, REPLY))
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
