"""The spool's file and its index: offsets, holes, lines and times, and a SIGKILL at any moment."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gcsagent.agent import spool_index
from gcsagent.agent.counters import CounterSlots, queued
from gcsagent.agent.spool import GRANULE, Spool, make_file
from gcsagent.agent.spool_index import ENTRIES, SHARED_NS, SpoolIndex

ROOT = Path(__file__).parents[2]


class Files:
    """A spool, a pipe into it, and everything closed at the end."""

    def __init__(self, directory: Path) -> None:
        self.counters = CounterSlots()
        self.slot = self.counters.allocate()
        self.file = make_file(str(directory))
        self.spool = Spool(self.file, self.counters, self.slot)
        self.source, self.process = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def put(self, data: bytes) -> None:
        while data:
            data = data[os.write(self.process, data[:65536]) :]
            while queued(self.source):
                self.spool.take(self.source, 1 << 20)

    def get(self, start: int, end: int) -> bytes:
        fd = self.spool.reader(start)
        try:
            return os.read(fd, end - start)
        finally:
            os.close(fd)

    def blocks(self) -> int:
        return os.fstat(self.file).st_blocks * 512

    def close(self) -> None:
        for fd in (self.file, self.source, self.process, self.counters.fd):
            os.close(fd)


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Files]:
    files = Files(tmp_path)
    yield files
    files.close()


# -- the file -----------------------------------------------------------------------------------------


def test_a_byte_of_the_stream_has_its_offset_in_the_file(files: Files) -> None:
    data = random.Random(1).randbytes(300_000)
    files.put(data)
    assert (files.spool.written, files.spool.first, files.spool.kept) == (300_000, 0, 300_000)
    assert files.get(0, 300_000) == data
    assert files.get(123_456, 200_000) == data[123_456:200_000]
    with pytest.raises(BlockingIOError):
        files.spool.take(files.source, 10)
    os.write(files.process, b"abc")
    assert files.spool.take(files.source, 2) == 2
    assert files.get(300_000, 300_003) == b"ab"


def test_nothing_of_it_has_a_name(files: Files, tmp_path: Path) -> None:
    files.put(b"x")
    assert list(tmp_path.iterdir()) == []


def test_what_is_released_takes_no_room_and_the_rest_stays(files: Files) -> None:
    data = random.Random(2).randbytes(10 * GRANULE)
    files.put(data)
    assert files.blocks() >= 10 * GRANULE
    for offset in (1, GRANULE - 1, 5 * GRANULE + 17, 3, 8 * GRANULE):
        files.spool.release(offset)
        files.spool.punch()
        first = files.spool.first
        assert files.get(first, len(data)) == data[first:]
        assert files.blocks() <= len(data) - first + 2 * GRANULE
    assert files.spool.first == 8 * GRANULE
    assert files.spool.kept == 2 * GRANULE


def test_bytes_under_way_to_a_client_are_not_changed_by_their_release(files: Files) -> None:
    """sendfile hands out the file's own pages: a hole must not zero what sits in a socket."""
    data = random.Random(3).randbytes(8 * GRANULE)
    fcntl.fcntl(files.process, fcntl.F_SETPIPE_SZ, 1 << 20)  # as the process may do, to write more at once
    assert os.write(files.process, data) == len(data)
    while queued(files.source):
        assert files.spool.take(files.source, 1 << 20) <= GRANULE
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        cursor = files.spool.reader(100)
        sent = os.sendfile(ours.fileno(), cursor, None, 1 << 20)
        assert sent > GRANULE
        assert os.lseek(cursor, 0, os.SEEK_CUR) == 100 + sent
        for offset in range(0, len(data), 4099):
            files.spool.release(offset)
            files.spool.punch()
        found = b""
        while len(found) < sent:
            found += theirs.recv(sent)
        assert found == data[100 : 100 + sent]
        os.close(cursor)


def test_a_later_agent_goes_on_where_the_descriptions_stand(files: Files) -> None:
    files.put(b"a" * 100_000)
    files.spool.release(70_000)  # killed before the hole is made
    again = Spool(files.file, files.counters, files.slot)
    assert (again.written, again.first) == (100_000, 70_000)
    again.punch()
    assert files.blocks() <= 100_000 - GRANULE + 4096
    files.spool = again
    files.put(b"b")
    assert files.get(99_999, 100_001) == b"ab"


def test_without_nameless_files_it_is_in_memory() -> None:
    fd = make_file("/proc")
    assert "memfd" in os.readlink(f"/proc/self/fd/{fd}")
    os.close(fd)


def test_a_directory_that_is_not_there_is_an_error() -> None:
    with pytest.raises(FileNotFoundError):
        make_file("/nowhere/at/all")


# -- killed -------------------------------------------------------------------------------------------

CHILD = """
import os, select, sys
from gcsagent.agent.counters import CounterSlots
from gcsagent.agent.spool import Spool
file, counters, source, sink, slot, cursor = map(int, sys.argv[1:])
spool = Spool(file, CounterSlots(counters), slot)
print("moving", flush=True)
while True:
    select.select([source], [], [])
    spool.take(source, 1 << 20)
    while (left := spool.written - os.lseek(cursor, 0, os.SEEK_CUR)) > 0:
        select.select([], [sink], [])
        try:
            os.sendfile(sink, cursor, None, left)
        except BlockingIOError:
            pass
    spool.release(max(spool.first, spool.written - 300_000))
    spool.punch()
"""


@pytest.mark.timeout(120)
def test_killed_at_any_moment_every_byte_goes_in_and_out_once(files: Files) -> None:
    """A real SIGKILL of who moves the bytes; the next goes on with the same descriptions."""
    chance, block = random.Random(5), random.Random(6).randbytes(1 << 20)
    os.set_blocking(files.source, True)
    cursor = files.spool.reader(0)
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    inherited = [files.file, files.counters.fd, files.source, ours.fileno()]
    argv = [sys.executable, "-c", CHILD, *map(str, [*inherited, files.slot, cursor])]
    fed = received = 0

    def expected(start: int, count: int) -> bytes:
        at = start % len(block)
        return (block + block)[at : at + count]

    def collect() -> int:
        nonlocal received
        before = received
        try:
            while data := theirs.recv(1 << 20):
                assert data == expected(received, len(data))
                received += len(data)
        except BlockingIOError:
            pass
        return received - before

    for _ in range(15):
        child = subprocess.Popen(argv, pass_fds=[*inherited, cursor], cwd=ROOT, stdout=subprocess.PIPE)
        assert child.stdout is not None
        assert child.stdout.readline() == b"moving\n"
        until = received + chance.randrange(1, 4 << 20)
        while received < until:
            with contextlib.suppress(BlockingIOError):
                fed += os.write(files.process, expected(fed, chance.randrange(1, 65_536)))
            collect()
        child.send_signal(signal.SIGKILL)
        child.wait(10)
        child.stdout.close()
        collect()
        assert received == os.lseek(cursor, 0, os.SEEK_CUR)
        again = Spool(files.file, files.counters, files.slot)
        assert again.written + queued(files.source) == fed
        assert files.get(again.first, again.written) == expected(again.first, again.kept)
    ours.close()
    theirs.close()
    os.close(cursor)


# -- lines --------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(
    lines=st.lists(st.binary(max_size=300).map(lambda line: line.replace(b"\n", b".")), max_size=30),
    end=st.binary(max_size=5).map(lambda line: line.replace(b"\n", b".")),
    repeat=st.sampled_from([1, 40]),
    wanted=st.integers(0, 50),
    gone=st.floats(0, 1),
)
def test_the_last_lines_are_what_tail_would_show(
    lines: list[bytes], end: bytes, repeat: int, wanted: int, gone: float
) -> None:
    data = b"".join(line + b"\n" for line in lines * repeat) + end
    files = Files(Path(tempfile.gettempdir()))
    try:
        files.put(data)
        files.spool.release(int(gone * len(data)))
        kept = data[files.spool.first :]
        offset = asyncio.run(files.spool.tail(wanted))
        last = _lines(kept)
        assert data[offset:] == b"".join(last[len(last) - wanted :] if wanted < len(last) else last)
    finally:
        files.close()


def _lines(data: bytes) -> list[bytes]:
    """splitlines() of bytes ends lines at a carriage return, too."""
    parts = data.split(b"\n")
    return [part + b"\n" for part in parts[:-1]] + ([parts[-1]] if parts[-1] else [])


# -- times --------------------------------------------------------------------------------------------


@pytest.fixture
def index() -> Iterator[SpoolIndex]:
    index = SpoolIndex()
    yield index
    index.close()


def test_a_moment_has_an_offset(index: SpoolIndex) -> None:
    assert index.since(0) is None
    for number in range(10):
        index.note(number * 100, number * SHARED_NS, 0)
    assert [index.since(number * SHARED_NS) for number in (0, 3, 9)] == [0, 300, 900]
    assert index.since(3 * SHARED_NS + 1) == 400
    assert index.since(10 * SHARED_NS) is None


def test_writes_close_together_share_an_entry_that_is_as_late_as_the_last(index: SpoolIndex) -> None:
    for time_ns in (0, 10, SHARED_NS - 1):
        index.note(time_ns, time_ns, 0)
    index.note(SHARED_NS, SHARED_NS, 0)
    assert index.entries() == [(0, SHARED_NS - 1), (SHARED_NS, SHARED_NS)]


def test_a_clock_set_back_loses_nothing(index: SpoolIndex) -> None:
    for offset, time_ns in ((0, 10**18), (5, 10**17), (9, 2 * 10**17)):
        index.note(offset, time_ns, 0)
    assert index.since(10**18) == 0
    assert index.since(10**17) == 0
    assert index.since(2 * 10**18) is None


def test_it_is_bounded_and_never_begins_too_late(index: SpoolIndex) -> None:
    writes = 5 * ENTRIES
    for number in range(writes):
        index.note(number * 10, number * SHARED_NS, 0)
        if number % 997 == 0:
            assert len(index.entries()) <= ENTRIES
    entries = index.entries()
    assert len(entries) <= ENTRIES
    assert entries[0][0] == 0
    assert entries[-1] == ((writes - 1) * 10, (writes - 1) * SHARED_NS)
    assert entries == sorted(entries)
    for number in range(0, writes, 331):
        found = index.since(number * SHARED_NS)
        assert found is not None
        assert found <= number * 10
    recent = writes - ENTRIES // 4
    assert index.since(recent * SHARED_NS) == recent * 10  # the newest are known exactly


def test_entries_of_bytes_that_are_gone_go_first(index: SpoolIndex) -> None:
    for number in range(ENTRIES):
        index.note(number * 10, number * SHARED_NS, 0)
    index.note(ENTRIES * 10, ENTRIES * SHARED_NS, (ENTRIES - 100) * 10 + 5)
    assert index.entries() == [
        (number * 10, number * SHARED_NS) for number in range(ENTRIES - 100, ENTRIES + 1)
    ]


def test_a_later_agent_reads_it_and_half_a_thinning_does_not_count(
    index: SpoolIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_index, "ENTRIES", 64)
    for number in range(64):
        index.note(number, number * SHARED_NS, 0)
    before = index.entries()
    again = SpoolIndex(os.dup(index.fd))
    assert again.entries() == before

    class Killed(BaseException):
        pass

    def kill(*_: object) -> None:
        raise Killed

    monkeypatch.setattr(SpoolIndex, "_at", _at_most(SpoolIndex._at, 20, kill))
    with pytest.raises(Killed):
        index.note(64, 64 * SHARED_NS, 0)
    monkeypatch.undo()
    monkeypatch.setattr(spool_index, "ENTRIES", 64)
    third = SpoolIndex(os.dup(index.fd))
    assert third.entries() == before
    third.note(64, 64 * SHARED_NS, 0)
    assert third.entries()[-1] == (64, 64 * SHARED_NS)
    again.close()
    third.close()


def _at_most(real: object, times: int, then: object) -> object:
    left = [times]

    def limited(*arguments: object) -> object:
        left[0] -= 1
        if left[0] < 0:
            then()  # type: ignore[operator]
        return real(*arguments)  # type: ignore[operator]

    return limited
