"""The archiver's end of a connection: what it takes in, and how it ends."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from gcsagent.archiver.peer import Gone, Peer
from protocol.errors import Code, RemoteProtocolError, RpcError
from protocol.families.archive import DATA, END
from protocol.framing import Message, Notification, Request, Response, decode, encode
from protocol.limits import MAX_CHUNK, Limits
from protocol.methods import CANCEL, PROTOCOL_ERROR
from protocol.scan import FrameScanner


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The host's, and the archiver's."""
    host, guest = socket.socketpair()
    host.settimeout(10)
    with host, guest:
        yield host, guest


def note(method: str, **params: object) -> bytes:
    return encode(Notification(method, params))


def all_messages(host: socket.socket, ending: Callable[[], None]) -> list[Message]:
    """What comes while ``ending`` runs in a thread, until the response or farewell; then the host closes."""
    thread = threading.Thread(target=ending)
    thread.start()
    scanner, found = FrameScanner(Limits()), list[Message]()
    while not (
        found and (isinstance(found[-1], Response) or getattr(found[-1], "method", "") == PROTOCOL_ERROR)
    ):
        data = host.recv(65536)
        assert data
        scanner.feed(data)
        while (frame := scanner.next_frame()) is not None:
            found.append(decode(frame))
    host.close()
    thread.join(10)
    assert not thread.is_alive()
    return found


def test_data_comes_in_order_and_ends(ends: tuple[socket.socket, socket.socket]) -> None:
    host, guest = ends
    peer = Peer(guest, 7, None)
    host.sendall(note(DATA, data=b"one") + note("later.thing") + note(CANCEL, msgid=8) + note(DATA, data=b""))
    host.sendall(note(DATA, data=b"two") + note(END, bytes=6))
    assert [peer.next_data() for _ in range(4)] == [b"one", b"two", b"", b""]
    assert peer.end is not None
    assert (peer.end.bytes, peer.end.sha256) == (6, None)


@pytest.mark.parametrize(
    "frame, error",
    [
        (note(CANCEL, msgid=7), RpcError),
        (note(DATA, data="text"), RemoteProtocolError),
        (note(DATA, data=bytes(MAX_CHUNK + 1)), RemoteProtocolError),
        (note(END, bytes=-1), RemoteProtocolError),
        (encode(Request(8, "agent.ping", {})), RemoteProtocolError),
        (b"\xc1", RemoteProtocolError),
    ],
)
def test_what_ends_it(
    ends: tuple[socket.socket, socket.socket], frame: bytes, error: type[Exception]
) -> None:
    host, guest = ends
    threading.Thread(target=host.sendall, args=(frame,)).start()
    with pytest.raises(error):
        Peer(guest, 7, None).next_data()


def test_a_host_that_closes_is_gone(ends: tuple[socket.socket, socket.socket]) -> None:
    host, guest = ends
    host.close()
    with pytest.raises(Gone):
        Peer(guest, 7, None).next_data()
    with pytest.raises(Gone):
        Peer(guest, 7, None).send_data(b"x")


def send_for_ever(peer: Peer) -> None:
    while True:
        peer.send_data(bytes(MAX_CHUNK))


def test_a_deadline_amid_a_message_ends_the_message_then_answers(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    host, guest = ends
    peer = Peer(guest, 7, 0.05)
    with pytest.raises(RpcError) as caught:
        send_for_ever(peer)
    assert caught.value.code is Code.DEADLINE_EXCEEDED
    found = all_messages(host, lambda: peer.answer(None, caught.value))
    assert len(found) > 1
    assert set(map(repr, found[:-1])) == {repr(Notification(DATA, {"data": bytes(MAX_CHUNK)}))}
    assert found[-1] == Response(7, caught.value.to_wire(), None)


def test_a_cancel_is_heard_while_sending(ends: tuple[socket.socket, socket.socket]) -> None:
    host, guest = ends
    peer = Peer(guest, 7, 10)
    host.sendall(note(CANCEL, msgid=7))
    with pytest.raises(RpcError) as caught:
        send_for_ever(peer)
    assert caught.value.code is Code.CANCELLED


def test_what_is_still_being_sent_does_not_keep_the_answer_from_its_way(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    host, guest = ends
    peer = Peer(guest, 7, None)
    host.sendall(note(DATA, data=bytes(100_000)))
    assert all_messages(host, lambda: peer.answer({"bytes": 1}, None)) == [Response(7, None, {"bytes": 1})]


def test_a_breach_is_said_before_the_end(ends: tuple[socket.socket, socket.socket]) -> None:
    host, guest = ends
    peer = Peer(guest, 7, None)
    [farewell] = all_messages(host, lambda: peer.farewell(RemoteProtocolError("malformed", "no")))
    assert farewell == Notification(PROTOCOL_ERROR, {"kind": "malformed", "message": "no"})
