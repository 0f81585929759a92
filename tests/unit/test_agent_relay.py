"""Counters and pumps: every byte once and in order, and a count that is exact wherever the agent dies."""

from __future__ import annotations

import asyncio
import fcntl
import os
import random
import select
import signal
import socket
import subprocess
import sys
import tty
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from gcsagent.agent import relay
from gcsagent.agent.counters import SLOTS, CounterSlots, queued
from gcsagent.agent.relay import MiddlePipe, Pump, PumpState
from tests.cases.descriptors import descriptors, settled_descriptors

ROOT = Path(__file__).parents[2]


# -- counters ---------------------------------------------------------------------------------------


def test_the_word_says_what_has_reached_the_sink_in_either_state() -> None:
    counters = CounterSlots()
    slot = counters.allocate()
    assert counters.delivered(slot, 0) == 0
    counters.filling(slot, 1000)
    assert counters.delivered(slot, 0) == 1000
    assert counters.delivered(slot, 77) == 1000  # what the middle pipe holds is new
    counters.draining(slot, 1077)
    assert counters.delivered(slot, 77) == 1000
    assert counters.delivered(slot, 7) == 1070
    assert counters.delivered(slot, 0) == 1077


def test_counts_are_exact_up_to_the_largest_offset_of_the_contract() -> None:
    counters = CounterSlots()
    slot = counters.allocate()
    counters.draining(slot, (1 << 63) - 1)
    assert counters.delivered(slot, 3) == (1 << 63) - 4


def test_slots_are_used_again_start_at_nothing_and_run_out_with_an_error() -> None:
    counters = CounterSlots()
    first, second = counters.allocate(), counters.allocate()
    assert first != second != 0 != first
    counters.draining(first, 5)
    counters.free(first)
    assert counters.allocate() == first
    assert counters.delivered(first, 0) == 0
    for _ in range(SLOTS - 3):
        counters.allocate()
    with pytest.raises(OverflowError, match="65535 streams"):
        counters.allocate()


def test_a_later_agent_reads_the_words_and_gives_used_slots_to_nobody_else() -> None:
    first = CounterSlots()
    slots = [first.allocate() for _ in range(5)]
    first.filling(slots[1], 10)
    first.draining(slots[3], 20)
    second = CounterSlots(os.dup(first.fd))
    second.claim({slots[1], slots[3]})
    assert second.delivered(slots[1], 0) == 10
    assert second.delivered(slots[3], 5) == 15
    given = {second.allocate() for _ in range(100)}
    assert len(given) == 100
    assert given.isdisjoint({0, slots[1], slots[3]})


# -- one pump ---------------------------------------------------------------------------------------


class Rig:
    """A pump with its callbacks noted; ``await rig.until(...)`` lets it run."""

    def __init__(self, counters: CounterSlots | None = None, middle: MiddlePipe | None = None) -> None:
        self.counters = counters or CounterSlots()
        self.slot = self.counters.allocate()
        self.middle = middle or MiddlePipe()
        self.ends: list[int] = []
        self.broken: list[int] = []
        self.progress: list[int] = []
        self.pump = self.make()

    def make(self) -> Pump:
        return Pump(
            self.counters,
            self.slot,
            self.middle,
            on_source_end=self.ends.append,
            on_sink_broken=self.broken.append,
            on_progress=self.progress.append,
        )

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not holds():  # noqa: ASYNC110 - the kernel makes it hold
                await asyncio.sleep(0)

    async def idle(self) -> None:
        """Long enough for everything that is ready now to have been seen to."""
        for _ in range(200):
            await asyncio.sleep(0)


def scenario(body: Callable[[Rig], Awaitable[None]]) -> None:
    async def run() -> None:
        counters = CounterSlots()
        before = settled_descriptors()
        rig = Rig(counters)
        await body(rig)
        rig.pump.detach()
        rig.middle.close()
        assert descriptors() == before

    asyncio.run(run())


def pipe() -> tuple[int, int]:
    return os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)


def sockets() -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    return ours, theirs


def take(fd: int) -> bytes:
    """Everything that is there now."""
    data = b""
    while True:
        try:
            chunk = os.read(fd, 1 << 20)
        except BlockingIOError:
            return data
        if not chunk:
            return data
        data += chunk


def test_a_pipe_to_a_socket_to_its_end() -> None:
    async def body(rig: Rig) -> None:
        read_end, write_end = pipe()
        ours, theirs = sockets()
        rig.pump.attach(read_end, ours.fileno())
        os.write(write_end, b"hello ")
        await rig.until(lambda: rig.pump.delivered == 6)
        os.write(write_end, b"world")
        os.close(write_end)
        await rig.until(lambda: rig.ends == [0])
        assert take(theirs.fileno()) == b"hello world"
        assert (rig.pump.delivered, rig.pump.in_middle, rig.pump.state) == (11, 0, PumpState.ENDED)
        assert rig.progress[-1] == 11
        os.close(read_end)
        ours.close()
        theirs.close()

    scenario(body)


def test_a_source_that_ended_before_it_was_attached_still_gives_what_is_left() -> None:
    async def body(rig: Rig) -> None:
        read_end, write_end = pipe()
        ours, theirs = sockets()
        os.write(write_end, b"x" * 60_000)
        os.close(write_end)
        rig.pump.attach(read_end, ours.fileno())
        await rig.until(lambda: rig.ends == [0])
        assert len(take(theirs.fileno())) == 60_000
        os.close(read_end)
        ours.close()
        theirs.close()

    scenario(body)


def test_a_socket_to_a_pipe_holds_what_does_not_fit_and_reports_progress_when_it_does() -> None:
    """The last progress is what closes stdin: it must come when the middle pipe has been emptied, too."""

    async def body(rig: Rig) -> None:
        read_end, write_end = pipe()
        ours, theirs = sockets()
        rig.pump.attach(ours.fileno(), write_end)
        data = random.Random(1).randbytes(300_000)
        sent = 0
        taken = b""

        def step() -> bool:
            nonlocal sent, taken
            try:
                sent += theirs.send(data[sent : sent + 50_000])
            except BlockingIOError:
                taken += take(read_end)
            if sent == len(data):
                taken += take(read_end)
            return len(taken) == len(data)

        await rig.until(step)
        await rig.until(lambda: rig.progress[-1:] == [len(data)])
        assert taken == data
        assert rig.progress == sorted(set(rig.progress))
        os.close(read_end)
        os.close(write_end)
        ours.close()
        theirs.close()

    scenario(body)


def test_the_last_progress_comes_even_if_nothing_follows_it() -> None:
    async def body(rig: Rig) -> None:
        read_end, write_end = pipe()
        ours, theirs = sockets()
        rig.pump.attach(ours.fileno(), write_end)
        fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 4096)  # one buffer
        sent = sum(theirs.send(b"a" * 1000) for _ in range(20))
        await rig.until(lambda: rig.pump.in_middle > 0)  # the pipe is full, it waits for the sink
        await rig.idle()
        await rig.until(lambda: bool(take(read_end)) and rig.pump.delivered == sent)
        assert rig.progress[-1] == sent
        for fd in (read_end, write_end):
            os.close(fd)
        ours.close()
        theirs.close()

    scenario(body)


def test_a_sink_that_takes_nothing_stops_the_source_from_being_read() -> None:
    async def body(rig: Rig) -> None:
        read_end, write_end = pipe()
        ours, theirs = sockets()
        rig.pump.attach(read_end, ours.fileno())
        written = 0
        for _ in range(10_000):
            try:
                written += os.write(write_end, b"x" * 4096)
            except BlockingIOError:
                await rig.idle()
                if not select.select([], [write_end], [], 0)[1]:
                    break
        assert written < 10_000 * 4096
        assert queued(read_end) > 0
        assert rig.pump.delivered + rig.pump.in_middle + queued(read_end) == written
        received = 0

        def step() -> bool:
            nonlocal received
            received += len(take(theirs.fileno()))
            return received == written

        await rig.until(step)
        assert rig.pump.delivered == written
        for fd in (read_end, write_end):
            os.close(fd)
        ours.close()
        theirs.close()

    scenario(body)


def test_pipes_grow_for_a_stream_that_fills_them_and_only_then() -> None:
    async def body(rig: Rig) -> None:
        (source, writer), (ours, theirs) = pipe(), sockets()
        try:
            rig.pump.attach(source, ours.fileno())
            os.write(writer, b"little")
            await rig.until(lambda: rig.pump.delivered == 6)
            assert fcntl.fcntl(source, fcntl.F_GETPIPE_SZ) == relay.SMALL
            os.write(writer, bytes(relay.SMALL))
            await rig.until(lambda: rig.pump.delivered == 6 + relay.SMALL)
            sizes = [fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ) for fd in (source, rig.middle.read_end)]
            assert sizes == [relay.LARGE, relay.LARGE]
            assert take(theirs.fileno()) == b"little" + bytes(relay.SMALL)
        finally:
            rig.pump.detach()
            for fd in (source, writer):
                os.close(fd)
            ours.close()
            theirs.close()

    scenario(body)


def test_a_sink_that_is_gone_is_told_once_and_what_did_not_arrive_is_still_there_for_the_next() -> None:
    async def body(rig: Rig) -> None:
        read_end, write_end = pipe()
        ours, theirs = sockets()
        rig.pump.attach(read_end, ours.fileno())
        theirs.close()
        os.write(write_end, b"for whoever comes")
        await rig.until(lambda: len(rig.broken) == 1)
        await rig.idle()
        assert len(rig.broken) == 1
        assert (rig.pump.delivered, rig.pump.in_middle) == (0, 17)
        ours.close()
        again, other = sockets()
        rig.pump.attach(read_end, again.fileno())
        await rig.until(lambda: rig.pump.delivered == 17)
        assert take(other.fileno()) == b"for whoever comes"
        for fd in (read_end, write_end):
            os.close(fd)
        again.close()
        other.close()

    scenario(body)


def test_a_pipe_nobody_reads_any_more_breaks_the_sink() -> None:
    async def body(rig: Rig) -> None:
        read_end, write_end = pipe()
        ours, theirs = sockets()
        rig.pump.attach(ours.fileno(), write_end)
        os.close(read_end)
        theirs.send(b"x")
        await rig.until(lambda: len(rig.broken) == 1)
        os.close(write_end)
        ours.close()
        theirs.close()

    scenario(body)


def test_a_terminal_to_a_socket_until_it_hangs_up() -> None:
    """A master answers EIO once the last slave is closed: after the last byte, and it is a plain end."""

    async def body(rig: Rig) -> None:
        master, slave = os.openpty()
        tty.setraw(slave)
        os.set_blocking(master, False)
        ours, theirs = sockets()
        rig.pump.attach(master, ours.fileno())
        data = b"0123456789" * 300
        os.write(slave, data)
        os.close(slave)
        await rig.until(lambda: rig.ends == [0])
        assert take(theirs.fileno()) == data
        assert rig.pump.delivered == len(data)
        os.close(master)
        ours.close()
        theirs.close()

    scenario(body)


def test_a_socket_to_a_terminal() -> None:
    async def body(rig: Rig) -> None:
        master, slave = os.openpty()
        tty.setraw(slave)
        os.set_blocking(master, False)
        os.set_blocking(slave, False)
        ours, theirs = sockets()
        rig.pump.attach(ours.fileno(), master)
        theirs.send(b"typed")
        await rig.until(lambda: rig.progress == [5])
        assert os.read(slave, 100) == b"typed"
        for fd in (master, slave):
            os.close(fd)
        ours.close()
        theirs.close()

    scenario(body)


def test_detach_and_attach_at_any_point_lose_double_and_reorder_nothing() -> None:
    async def body(rig: Rig) -> None:
        chance = random.Random(7)
        data = chance.randbytes(2_000_000)
        read_end, write_end = pipe()
        ours, theirs = sockets()
        written, received = 0, b""
        attached = False
        async with asyncio.timeout(30):
            while len(received) < len(data):
                if written < len(data) and select.select([], [write_end], [], 0)[1]:
                    written += os.write(write_end, data[written : written + chance.randrange(1, 4096)])
                if chance.random() < 0.1:
                    if attached:
                        rig.pump.detach()
                        rig.pump.detach()
                        if chance.random() < 0.5:
                            rig.pump = rig.make()  # as a later agent would
                    else:
                        rig.pump.attach(read_end, ours.fileno())
                    attached = not attached
                if chance.random() < 0.3:
                    received += take(theirs.fileno())
                    if not attached:
                        assert rig.pump.delivered == len(received)
                await asyncio.sleep(0)
        assert received == data
        rig.pump.detach()
        for fd in (read_end, write_end):
            os.close(fd)
        ours.close()
        theirs.close()

    scenario(body)


def test_two_pumps_share_one_socket_as_a_terminals_do() -> None:
    async def body(rig: Rig) -> None:
        other = Rig(rig.counters)
        master, slave = os.openpty()
        tty.setraw(slave)
        os.set_blocking(master, False)
        os.set_blocking(slave, False)
        ours, theirs = sockets()
        rig.pump.attach(master, ours.fileno())
        other.pump.attach(ours.fileno(), master)
        os.write(slave, b"to the host")
        theirs.send(b"to the program")
        await rig.until(lambda: rig.pump.delivered == 11 and other.pump.delivered == 14)
        assert take(theirs.fileno()) == b"to the host"
        assert os.read(slave, 100) == b"to the program"
        other.pump.detach()
        os.write(slave, b"!")
        await rig.until(lambda: rig.pump.delivered == 12)
        rig.pump.detach()
        other.middle.close()
        for fd in (master, slave):
            os.close(fd)
        ours.close()
        theirs.close()

    scenario(body)


def test_one_busy_stream_leaves_the_loop_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wake-up is bounded: a timer due at once comes before an endless source has been moved."""

    async def body(rig: Rig) -> None:
        zero, null = os.open("/dev/zero", os.O_RDONLY), os.open("/dev/null", os.O_WRONLY)
        runs = 0
        real = os.splice

        def splice(*args: int, **kwargs: int) -> int:
            nonlocal runs
            runs += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(os, "splice", splice)
        rig.pump._source, rig.pump._sink = zero, null
        rig.pump.state = PumpState.ATTACHED
        rig.pump._loop = _NoWatching(rig.pump._loop)  # type: ignore[assignment]
        rig.pump._run()
        assert runs <= 2 * relay.ROUNDS
        rig.pump._source = rig.pump._sink = -1
        rig.pump.state = PumpState.IDLE
        os.close(zero)
        os.close(null)

    scenario(body)


class _NoWatching:
    """/dev/zero and /dev/null cannot be watched by epoll, and need not be."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def __getattr__(self, _name: str) -> Callable[..., None]:
        return lambda *_: None


# -- death at every step ------------------------------------------------------------------------------


class Killed(Exception):
    """Stands for SIGKILL: nothing after it is run."""


@pytest.mark.parametrize("sink_room", [1000, 65_536, 1 << 20], ids=["tight", "a pipe", "ample"])
def test_the_count_is_exact_if_the_agent_dies_between_any_two_steps(
    monkeypatch: pytest.MonkeyPatch, sink_room: int
) -> None:
    """Each splice and each store is a step; death is tried before and after each, for a whole transfer."""

    async def life(step_to_die_at: int) -> bool:
        """One transfer with one death; False when it ended before that step."""
        counters = CounterSlots()
        slot = counters.allocate()
        middle = MiddlePipe()
        read_end, write_end = pipe()
        ours, theirs = sockets()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, sink_room)
        data = random.Random(step_to_die_at).randbytes(50_000)
        os.write(write_end, data)
        os.close(write_end)
        steps = 0
        died = False

        def mortal(real: Callable[..., object]) -> Callable[..., object]:
            def call(*args: object, **kwargs: object) -> object:
                nonlocal steps, died
                for half in (True, False):
                    if not died and steps == step_to_die_at:
                        died = True
                        raise Killed
                    steps += 1
                    if half:
                        result = real(*args, **kwargs)
                return result

            return call

        ended: list[int] = []
        received = b""

        def make() -> Pump:
            return Pump(counters, slot, middle, on_source_end=ended.append, on_sink_broken=ended.append)

        real_splice = os.splice
        monkeypatch.setattr(os, "splice", mortal(real_splice))
        monkeypatch.setattr(counters, "filling", mortal(counters.filling))
        monkeypatch.setattr(counters, "draining", mortal(counters.draining))
        pump = make()
        pump._loop = loop = _NoWatching(pump._loop)  # type: ignore[assignment]
        try:
            pump.attach(read_end, ours.fileno())
            while not ended:
                pump._run()
                received += take(theirs.fileno())
        except Killed:
            pass
        received += take(theirs.fileno())
        if died:
            successor = make()
            assert successor.delivered == len(received)
            assert successor.in_middle == queued(middle.read_end)
            successor._loop = loop  # type: ignore[assignment]
            successor.attach(read_end, ours.fileno())
            while not ended:
                successor._run()
                received += take(theirs.fileno())
            assert successor.delivered == len(data)
        monkeypatch.setattr(os, "splice", real_splice)
        assert received == data
        middle.close()
        for fd in (read_end, counters.fd):
            os.close(fd)
        ours.close()
        theirs.close()
        return died

    async def lives() -> None:
        step = 0
        while await life(step):
            step += 1
        assert step > 8

    asyncio.run(lives())


CHILD = """
import asyncio, sys
from gcsagent.agent.counters import CounterSlots
from gcsagent.agent.relay import MiddlePipe, Pump

async def main(counters, read_end, write_end, source, sink, slot):
    slots = CounterSlots(counters)
    done = asyncio.Event()
    pump = Pump(slots, slot, MiddlePipe((read_end, write_end)),
                on_source_end=lambda code: done.set(), on_sink_broken=lambda code: done.set())
    pump.attach(source, sink)
    sys.stdout.write("moving\\n")
    sys.stdout.flush()
    await done.wait()

asyncio.run(main(*map(int, sys.argv[1:])))
"""


@pytest.fixture
def transfer() -> Iterator[dict[str, int]]:
    read_end, write_end = pipe()
    middle = MiddlePipe()
    ours, theirs = sockets()
    counters = CounterSlots()
    yield {
        "counters": counters.fd,
        "read": middle.read_end,
        "write": middle.write_end,
        "source": read_end,
        "sink": ours.fileno(),
        "slot": counters.allocate(),
        "feed": write_end,
        "out": theirs.fileno(),
    }
    ours.close()
    theirs.close()


@pytest.mark.timeout(120)
def test_a_pump_killed_twenty_times_delivers_every_byte_once(transfer: dict[str, int]) -> None:
    """A real SIGKILL at a random moment of a real transfer, the next child going on with the same files."""
    chance = random.Random()
    counters = CounterSlots(transfer["counters"])
    block = random.Random(3).randbytes(1 << 20)
    fed = received = deaths = 0
    inherited = [transfer[name] for name in ("counters", "read", "write", "source", "sink")]
    argv = [sys.executable, "-c", CHILD, *map(str, [*inherited, transfer["slot"]])]

    def expected(start: int, count: int) -> bytes:
        at = start % len(block)
        return (block + block)[at : at + count]

    while deaths < 20:
        child = subprocess.Popen(argv, pass_fds=inherited, cwd=ROOT, stdout=subprocess.PIPE)
        assert child.stdout is not None
        assert child.stdout.readline() == b"moving\n"
        until = received + chance.randrange(1, 3 << 20)
        while True:
            readable, writable, _ = select.select([transfer["out"]], [transfer["feed"]], [], 10)
            assert readable or writable
            if writable:
                chunk = expected(fed, chance.randrange(1, 65_536))
                fed += os.write(transfer["feed"], chunk)
            if readable:
                data = os.read(transfer["out"], 1 << 20)
                assert data == expected(received, len(data))
                received += len(data)
                if received >= until:
                    break
        child.send_signal(signal.SIGKILL)
        child.wait(10)
        child.stdout.close()
        deaths += 1
        rest = take(transfer["out"])
        assert rest == expected(received, len(rest))
        received += len(rest)
        assert counters.delivered(transfer["slot"], queued(transfer["read"])) == received
        assert received + queued(transfer["read"]) + queued(transfer["source"]) == fed
