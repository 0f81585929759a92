"""The frame scanner: where a message ends, in bounded time and memory, whatever the bytes."""

from __future__ import annotations

import tracemalloc

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import scan
from protocol.errors import RemoteProtocolError
from protocol.limits import Limits
from protocol.scan import FrameScanner

WIDE = Limits(max_frame=1 << 16, max_depth=32)

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=40)
    | st.binary(max_size=300)
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=20) | st.dictionaries(st.text("abc", max_size=3), inner, max_size=18)
    ),
    max_leaves=30,
)


def frames_of(scanner: FrameScanner, chunks: list[bytes]) -> list[bytes]:
    found = []
    for chunk in chunks:
        scanner.feed(chunk)
        while (frame := scanner.next_frame()) is not None:
            found.append(frame)
    return found


def fault_of(data: bytes, limits: Limits, *, size: int) -> str | None:
    """The kind of fault in ``data`` when it comes in pieces of ``size`` bytes."""
    scanner = FrameScanner(limits)
    try:
        frames_of(scanner, [data[at : at + size] for at in range(0, len(data), size)])
    except RemoteProtocolError as error:
        return error.kind
    return None


@settings(deadline=None)
@given(st.lists(values, max_size=4), st.integers(1, 9))
def test_splits_any_values_at_any_place(wanted: list[object], size: int) -> None:
    packed = [msgpack.packb(value) for value in wanted]
    stream = b"".join(packed)
    chunks = [stream[at : at + size] for at in range(0, len(stream), size)]
    assert frames_of(FrameScanner(WIDE), [stream]) == packed
    assert frames_of(FrameScanner(WIDE), chunks) == packed


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=60))
def test_agrees_with_msgpack_on_what_is_whole(data: bytes) -> None:
    scanner = FrameScanner(WIDE)
    scanner.feed(data)
    try:
        frame = scanner.next_frame()
    except RemoteProtocolError:
        return  # stricter than msgpack: its limits, ext types
    unpacker = msgpack.Unpacker(raw=True, strict_map_key=False, object_pairs_hook=list)
    unpacker.feed(data)
    try:
        unpacker.skip()
    except msgpack.OutOfData:
        assert frame is None
    else:
        assert frame == data[: unpacker.tell()]


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200), st.integers(1, 7))
def test_every_split_has_the_same_fault(data: bytes, size: int) -> None:
    small = Limits(max_frame=64, max_depth=4, max_values=40)
    assert fault_of(data, small, size=size) == fault_of(data, small, size=max(1, len(data)))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 1000])
@pytest.mark.parametrize(
    "data",
    [
        b"\x93\x80\x90\x91\x90",  # ends in empty containers, nested, at the last byte
        b"\xdc\x00\x01\xde\x00\x00",
        b"\x82\xa1a\x91\x81\xa1b\x90\xa0\xc0",
        b"\xc0",
        b"\x90",
        b"\xc4\x00",
    ],
)
def test_a_value_ends_with_its_last_byte(data: bytes, size: int) -> None:
    chunks = [data[at : at + size] for at in range(0, len(data), size)]
    scanner = FrameScanner(WIDE)
    assert frames_of(scanner, chunks) == [data]
    assert scanner.buffered == 0
    assert frames_of(FrameScanner(WIDE), [*chunks, *chunks]) == [data, data]


def test_the_frame_size_is_exact() -> None:
    limits = Limits(max_frame=100)
    exact = msgpack.packb(b"x" * 98)
    assert len(exact) == 100
    assert frames_of(FrameScanner(limits), [exact]) == [exact]
    assert frames_of(FrameScanner(limits), [exact + exact]) == [exact, exact]
    over = msgpack.packb(b"x" * 99)
    for size in (1, 50, 101):
        assert fault_of(over, limits, size=size) == "oversized"


@pytest.mark.parametrize(
    "last", [b"\xcb" + bytes(8), b"\xcd\0\0", b"\xbf" + b"x" * 31, b"\xc0", b"\x90", b"\xdc\0\0"]
)
def test_the_frame_size_is_exact_whatever_comes_last(last: bytes) -> None:
    exact = b"\x92\xa9" + b"x" * 9 + last
    assert frames_of(FrameScanner(Limits(max_frame=len(exact))), [exact]) == [exact]
    for size in (1, len(exact)):
        assert fault_of(exact, Limits(max_frame=len(exact) - 1), size=size) == "oversized"


def test_a_count_that_cannot_fit_is_refused_with_its_header() -> None:
    limits = Limits(max_frame=100)
    assert fault_of(b"\xdc\x00\x61", limits, size=3) is None  # 3 bytes and 97 more
    assert fault_of(b"\xdc\x00\x62", limits, size=3) == "oversized"
    assert fault_of(b"\xde\x00\x30", limits, size=1) is None  # a map of 48 has 96 values
    assert fault_of(b"\xde\x00\x31", limits, size=1) == "oversized"


def test_the_depth_is_exact() -> None:
    limits = Limits(max_depth=5)
    assert fault_of(b"\x91" * 5 + b"\xc0", limits, size=99) is None
    assert fault_of(b"\x91" * 4 + b"\x90", limits, size=99) is None
    assert fault_of(b"\x91" * 5 + b"\x90", limits, size=99) == "depth"
    assert fault_of(b"\x91" * 5 + b"\x80", limits, size=1) == "depth"
    beside = b"\x93" + (b"\x91" * 4 + b"\xc0") * 3  # siblings do not add up
    assert fault_of(beside, limits, size=99) is None


def test_the_number_of_values_is_exact_and_starts_anew_with_each_frame() -> None:
    limits = Limits(max_values=6)
    allowed = b"\x93\x91\xc0\x81\xa0\xc0\xc0"
    assert frames_of(FrameScanner(limits), [allowed, allowed]) == [allowed, allowed]
    assert fault_of(b"\x93\x91\xc0\x81\xa0\xc0\x91\xc0", limits, size=99) == "oversized"


@pytest.mark.parametrize(
    "bomb",
    [
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xdc\xff\xff" * 1000,
        b"\xdd\x00\x03\xff\xff" * 1000,
        b"\x9f" * 100_000,
    ],
)
def test_declared_lengths_take_no_memory(bomb: bytes) -> None:
    scanner = FrameScanner(Limits())
    tracemalloc.start()
    try:
        scanner.feed(bomb)
        with pytest.raises(RemoteProtocolError):
            scanner.next_frame()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < len(bomb) + 80_000  # with one of msgpack's unpackers, which is 40 KiB


@settings(deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=80), max_size=40))
def test_never_holds_more_than_a_frame_and_a_chunk(chunks: list[bytes]) -> None:
    limits = Limits(max_frame=64)
    scanner = FrameScanner(limits)
    for chunk in chunks:
        scanner.feed(chunk)
        try:
            while scanner.next_frame() is not None:
                pass
        except RemoteProtocolError:
            return
        assert scanner.buffered <= limits.max_frame


class CountingTable:
    """The format table, counting how often it is asked: once per header that is looked at."""

    def __init__(self, table: list[tuple[int, int]]) -> None:
        self.table = table
        self.reads = 0

    def __getitem__(self, index: int) -> tuple[int, int]:
        self.reads += 1
        return self.table[index]


@pytest.mark.parametrize("size", [1, 1 << 20])
def test_looks_at_every_value_once(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    table = CountingTable(scan._TABLE)
    monkeypatch.setattr(scan, "_TABLE", table)
    frame = msgpack.packb([[n, "x", {}] for n in range(5_000)])
    small = msgpack.packb([0, 1, "m", [{}]])
    stream = frame + small * 2_000
    chunks = [stream[at : at + size] for at in range(0, len(stream), size)]
    assert len(frames_of(FrameScanner(Limits()), chunks)) == 2_001
    values = 1 + 5_000 * 4  # the large one's: where a small one ends, msgpack says
    # A header of several bytes that comes in pieces is looked at once per piece, and no more.
    assert values <= table.reads <= len(stream) + 2_000


def test_a_blob_that_comes_byte_by_byte_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    table = CountingTable(scan._TABLE)
    monkeypatch.setattr(scan, "_TABLE", table)
    frame = msgpack.packb(["x", b"y" * 100_000])
    assert frames_of(FrameScanner(Limits()), [bytes([byte]) for byte in frame]) == [frame]
    assert table.reads <= len(frame) + 10


def values_of(data: bytes, limits: Limits, *, size: int) -> tuple[list[object], str]:
    """What is decoded of ``data`` in pieces of ``size`` bytes, and the kind of fault behind it."""
    scanner, found = FrameScanner(limits), []
    try:
        for at in range(0, len(data), size):
            scanner.feed(data[at : at + size])
            while True:
                value = scanner.next_value()
                if value is None and (frame := scanner.next_frame()) is None:
                    break
                found.append(value if value is not None else msgpack.unpackb(frame, strict_map_key=False))
    except (RemoteProtocolError, ValueError) as error:
        return found, getattr(error, "kind", "value")
    return found, ""


@settings(deadline=None, max_examples=300)
@given(st.lists(values, max_size=6), st.binary(max_size=8), st.integers(1, 9))
def test_what_is_decoded_at_once_is_what_comes_byte_by_byte(
    wanted: list[object], noise: bytes, size: int
) -> None:
    data = b"".join(map(msgpack.packb, wanted)) + noise
    limits = Limits(max_frame=1 << 16, max_depth=6)
    assert values_of(data, limits, size=len(data) or 1) == values_of(data, limits, size=size)
    assert values_of(data, limits, size=len(data) or 1) == values_of(data, limits, size=1)


@pytest.mark.parametrize("header", [b"\xdc\x01\x00", b"\xde\x01\x00", b"\xdd\xff\xff\xff\xff", b"\x9f"])
def test_headers_alone_cost_little_to_decode(header: bytes) -> None:
    scanner = FrameScanner(Limits())
    tracemalloc.start()
    try:
        scanner.feed(header * (16 * 1024 // len(header)))
        assert scanner.next_value() is None
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20
    with pytest.raises(RemoteProtocolError, match=r"nest|bytes"):
        scanner.next_frame()
