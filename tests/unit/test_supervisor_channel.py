"""The channel between supervisor and agent: whole packets, their descriptors, and what breaks the rules."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import msgpack
import pytest

from gcsagent.common import channel
from tests.cases.descriptors import descriptors, settled_descriptors


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = channel.pair()
    with left, right:
        left.settimeout(5)
        right.settimeout(5)
        yield left, right


def test_a_message_arrives_with_its_descriptors(ends: tuple[socket.socket, socket.socket]) -> None:
    left, right = ends
    read_end, write_end = os.pipe()
    channel.send(left, channel.pack([1, "hold", {"name": "ü"}]), (read_end, write_end))
    os.close(read_end)
    os.write(write_end, b"through")
    os.close(write_end)
    received = channel.receive(right)
    assert received is not None
    message, fds = received
    assert message == [1, "hold", {"name": "ü"}]
    assert os.read(fds[0], 100) == b"through"
    channel.close_all(fds)


def test_what_arrives_and_both_ends_are_close_on_exec(ends: tuple[socket.socket, socket.socket]) -> None:
    left, right = ends
    with open("/dev/null", "rb") as null:
        channel.send(left, channel.pack([1, "x", {}]), (null.fileno(),))
    received = channel.receive(right)
    assert received is not None
    assert not os.get_inheritable(received[1][0])
    assert not left.get_inheritable()
    assert not right.get_inheritable()
    channel.close_all(received[1])


def test_the_largest_packet_passes_and_one_byte_more_is_refused_by_its_sender(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    left, right = ends
    overhead = len(channel.pack([1, "x", b"a" * 70_000])) - 70_000
    largest = [1, "x", b"a" * (channel.MAX_PACKET - overhead)]
    packet = channel.pack(largest)
    assert len(packet) == channel.MAX_PACKET
    channel.send(left, packet)
    assert channel.receive(right) == (largest, [])
    with pytest.raises(channel.ChannelError, match="at most"):
        channel.pack([1, "x", b"a" * (channel.MAX_PACKET - overhead + 1)])


@pytest.mark.parametrize(
    "packet",
    [
        b"\xc1",
        b"\x93\x01",
        msgpack.packb([1, "x", {}]) + b"\x00",
        msgpack.packb([1, "x"]),
        msgpack.packb({"id": 1}),
        msgpack.packb(7),
        msgpack.packb([1, {7: 8}, {}]),
        b"\x93\x01\xa1\xff\x80",
        b"\x91" * 5000,
        b"\xdd\xff\xff\xff\xff",
        b"a" * (channel.MAX_PACKET + 1),
    ],
    ids=[
        "never used byte",
        "cut short",
        "trailing byte",
        "two items",
        "a map",
        "a number",
        "map with number keys",
        "no UTF-8",
        "too deep",
        "array of 2**32-1",
        "too long",
    ],
)
def test_a_bad_packet_is_one_error_and_its_descriptors_are_closed(
    ends: tuple[socket.socket, socket.socket], packet: bytes
) -> None:
    left, right = ends
    before = settled_descriptors()
    with open("/dev/null", "rb") as null:
        socket.send_fds(left, [packet], [null.fileno()] * 3)
    with pytest.raises(channel.ChannelError):
        channel.receive(right)
    assert descriptors() == before


def test_more_descriptors_than_allowed_are_refused_and_all_closed(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    left, right = ends
    before = settled_descriptors()
    with open("/dev/null", "rb") as null:
        socket.send_fds(left, [channel.pack([1, "x", {}])], [null.fileno()] * (channel.MAX_FDS + 1))
        with pytest.raises(channel.ChannelError, match="more descriptors"):
            channel.receive(right)
        socket.send_fds(left, [channel.pack([1, "x", {}])], [null.fileno()] * channel.MAX_FDS)
    received = channel.receive(right)
    assert received is not None
    assert len(received[1]) == channel.MAX_FDS
    channel.close_all(received[1])
    assert descriptors() == before


def test_the_end_of_the_other_side_is_none_after_its_last_packet(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    left, right = ends
    channel.send(left, channel.pack([1, "last", {}]))
    left.close()
    assert channel.receive(right) == ([1, "last", {}], [])
    assert channel.receive(right) is None


def test_nothing_there_yet_is_blocking_io_error(ends: tuple[socket.socket, socket.socket]) -> None:
    _, right = ends
    right.setblocking(False)
    with pytest.raises(BlockingIOError):
        channel.receive(right)


def test_a_full_channel_is_blocking_io_error_and_loses_no_packet(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    left, right = ends
    left.setblocking(False)
    sent = 0
    full = False
    while not full:
        try:
            channel.send(left, channel.pack([sent, "x", b"a" * 4096]))
        except BlockingIOError:
            full = True
        else:
            sent += 1
    right.setblocking(False)
    for number in range(sent):
        received = channel.receive(right)
        assert received is not None
        assert received[0][0] == number
    with pytest.raises(BlockingIOError):
        channel.receive(right)
