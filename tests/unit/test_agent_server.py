"""Listening: a stale socket file gives way, a live one does not, and who may connect."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from gcsagent.agent import server
from gcsagent.agent.bounds import Bounds
from gcsagent.agent.server import ListenError, Server, listen
from gcsagent.agent.session import Session
from protocol.errors import Code, RpcError
from protocol.limits import Limits
from tests.cases.descriptors import descriptors, settled_descriptors


class FakeListener:
    """Stands for a vsock listener: what accept(2) would give, one connection or error at a time.

    The development machine's own AF_VSOCK leads to its hypervisor, so no real one is made.
    """

    family = socket.AF_VSOCK

    def __init__(self, *accepts: tuple[socket.socket, tuple[int, int]] | OSError) -> None:
        self._accepts = list(accepts)
        self._read_end, self._write_end = os.pipe()
        os.write(self._write_end, b"x" * len(accepts))

    def fileno(self) -> int:
        return self._read_end

    def setblocking(self, _blocking: bool) -> None:
        return

    def accept(self) -> tuple[socket.socket, tuple[int, int]]:
        os.read(self._read_end, 1)
        found = self._accepts.pop(0)
        if isinstance(found, OSError):
            raise found
        return found

    def close(self) -> None:
        os.close(self._read_end)
        os.close(self._write_end)


class FakeSession:
    """Stands for a session: closing is all the server does to one."""

    def __init__(self, sock: socket.socket, guests: Server) -> None:
        self.sock, self.guests = sock, guests

    def close(self, _reason: str) -> None:
        self.sock.close()
        self.guests.gone(cast(Session, self))


class Sessions:
    """What the server made."""

    def __init__(self) -> None:
        self.peers: list[str] = []
        self.made: list[FakeSession] = []

    def make(self, sock: socket.socket, peer: str, guests: Server) -> Session:
        self.peers.append(peer)
        self.made.append(FakeSession(sock, guests))
        return cast(Session, self.made[-1])


def serve(peer_cid: int | None, *accepts: Any, wait: int) -> Sessions:
    """Serves until ``wait`` sessions or refusals have been seen."""
    made = Sessions()

    async def scenario() -> None:
        listener = FakeListener(*accepts)
        Server(peer_cid, made.make).serve(cast(socket.socket, listener))
        async with asyncio.timeout(10):
            while len(made.peers) < wait or listener._accepts:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        asyncio.get_running_loop().remove_reader(listener.fileno())
        listener.close()

    asyncio.run(scenario())
    return made


def connection(cid: int) -> tuple[socket.socket, socket.socket, tuple[int, int]]:
    ours, theirs = socket.socketpair()
    theirs.settimeout(5)
    return ours, theirs, (cid, 1234)


def test_only_the_hosts_cid_gets_a_session() -> None:
    stranger, its_end, address = connection(3)
    host, host_end, host_address = connection(2)
    made = serve(2, (stranger, address), (host, host_address), wait=1)
    assert made.peers == ["vsock:2:1234"]
    assert its_end.recv(1) == b""
    for sock in (its_end, host, host_end):
        sock.close()


def test_with_no_cid_asked_for_anybody_gets_one() -> None:
    one, its_end, address = connection(1)
    made = serve(None, (one, address), wait=1)
    assert made.peers == ["vsock:1:1234"]
    one.close()
    its_end.close()


def test_out_of_descriptors_it_pauses_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "ACCEPT_PAUSE", 0.01)
    one, its_end, address = connection(2)
    full = OSError(errno.EMFILE, "too many")
    aborted = OSError(errno.ECONNABORTED, "gone again")
    assert serve(2, full, aborted, full, (one, address), wait=1).peers == ["vsock:2:1234"]
    one.close()
    its_end.close()


def test_more_connections_than_allowed_are_not_let_in_until_one_ends() -> None:
    async def scenario() -> None:
        server_ = Server(None, Sessions().make, Bounds(Limits(max_connections=1)))
        first, second = (cast(Session, FakeSession(sock, server_)) for sock in socket.socketpair())
        server_.admit(first)
        with pytest.raises(RpcError, match="max_connections") as caught:
            server_.admit(second)
        assert caught.value.code is Code.RESOURCE_EXHAUSTED
        assert caught.value.details == {"limit": "max_connections", "value": 1}
        first.close("")
        server_.admit(second)
        second.close("")

    asyncio.run(scenario())


def test_of_those_who_do_not_say_hello_the_oldest_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_STRANGERS", 2)
    pairs = [connection(2) for _ in range(3)]
    made = serve(2, *((ours, address) for ours, _, address in pairs), wait=3)
    assert pairs[0][1].recv(1) == b""
    for _, theirs, _ in pairs[1:]:
        theirs.setblocking(False)
        with pytest.raises(BlockingIOError):
            theirs.recv(1)
    for session, (_, theirs, _) in zip(made.made, pairs, strict=True):
        session.sock.close()
        theirs.close()


# -- unix sockets -----------------------------------------------------------------------------------


def test_a_unix_socket_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "gcs.sock"
    with listen(f"unix:{path}"):
        assert os.stat(path).st_mode & 0o777 == 0o600


def test_a_stale_socket_file_gives_way(tmp_path: Path) -> None:
    path = tmp_path / "gcs.sock"
    listen(f"unix:{path}").close()
    assert path.exists()
    with listen(f"unix:{path}"), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_a_live_one_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "gcs.sock"
    with listen(f"unix:{path}") as first:
        with pytest.raises(ListenError, match="in use"):
            listen(f"unix:{path}")
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            first.settimeout(5)
            for _ in range(2):  # the probe's, then the client's
                first.accept()[0].close()


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda path: path.write_text("precious"), "in use"),
        (lambda path: path.mkdir(), "in use"),
        (lambda path: path.symlink_to("nowhere"), "in use"),
    ],
)
def test_what_is_no_socket_is_not_removed(tmp_path: Path, make: Callable[[Path], Any], says: str) -> None:
    path = tmp_path / "gcs.sock"
    make(path)
    before = settled_descriptors()
    with pytest.raises(ListenError, match=says):
        listen(f"unix:{path}")
    assert os.path.lexists(path)
    assert descriptors() == before


@pytest.mark.parametrize("path", ["/nowhere/at/all", "/" + "x" * 200])
def test_a_path_that_cannot_be_is_an_error_that_names_it(path: str) -> None:
    with pytest.raises(ListenError, match=path[:20]):
        listen(f"unix:{path}")
