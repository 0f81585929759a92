"""The console socket: a real pty master arrives by SCM_RIGHTS, or it does not."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from gcsagent.common.loop import Loop
from gcsagent.supervisor.console import MAX_PATH, ConsoleSocket
from tests.cases.descriptors import descriptors, settled_descriptors


class Counted(ConsoleSocket):
    """Knows how often it was woken to accept."""

    wakeups = 0

    def _accept(self, events: int) -> None:
        self.wakeups += 1
        super()._accept(events)


class Receiver:
    """A console socket, and what it has received."""

    def __init__(self, path: str) -> None:
        self.loop, self.path = Loop(), path
        self.fds: list[int] = []
        self.console = Counted(self.loop, path, self._received)

    def _received(self, fd: int) -> None:
        self.fds.append(fd)
        self.loop.stop()

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(self.path)
        return sock

    def run(self) -> None:
        guard = self.loop.after(10, lambda: pytest.fail("nothing was received"))
        self.loop.run()
        guard.cancel()


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[Receiver]:
    before = settled_descriptors()
    made = Receiver(str(tmp_path / "console"))
    yield made
    made.console.finish()
    made.console.finish()
    assert not os.path.exists(made.path)
    for fd in made.fds:
        os.close(fd)
    made.loop._epoll.close()
    assert descriptors() == before


def send_terminal(sock: socket.socket) -> tuple[int, str]:
    """As runc does: the master with some bytes of name. Returns the slave, and its name."""
    master, slave = os.openpty()
    socket.send_fds(sock, [b"/dev/ptmx"], [master])
    os.close(master)
    return slave, os.ttyname(slave)


def test_a_real_master_arrives_close_on_exec_and_works(receiver: Receiver) -> None:
    with receiver.connect() as sock:
        slave, _ = send_terminal(sock)
        receiver.run()
    (master,) = receiver.fds
    os.write(slave, b"hello")
    assert os.read(master, 100) == b"hello"
    assert not os.get_inheritable(master)
    os.close(slave)


def test_a_master_sent_just_before_the_runtime_exits_is_taken_at_the_end(receiver: Receiver) -> None:
    with receiver.connect() as sock:
        slave, _ = send_terminal(sock)
    receiver.console.finish()  # the loop has not come round to it
    assert len(receiver.fds) == 1
    os.close(slave)


def test_a_runtime_that_sends_nothing_or_never_connects_leaves_nothing(receiver: Receiver) -> None:
    receiver.connect().close()
    with receiver.connect():
        receiver.console.finish()
    assert receiver.fds == []


def test_without_a_descriptor_to_accept_with_it_looks_again_at_the_end(receiver: Receiver) -> None:
    with receiver.connect() as sock:
        slave, _ = send_terminal(sock)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        highest = max(int(name) for name in os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, limits[1]))
        filling = []
        try:
            with contextlib.suppress(OSError):
                while True:
                    filling.append(os.dup(0))
            receiver.loop.after(0.05, receiver.loop.stop)
            receiver.loop.run()
        finally:
            for fd in filling:
                os.close(fd)
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert (receiver.console.wakeups, receiver.fds) == (1, [])
        receiver.console.finish()
        assert len(receiver.fds) == 1
        os.close(slave)


def test_bytes_without_a_descriptor_are_no_terminal_and_the_next_connection_may_bring_it(
    receiver: Receiver,
) -> None:
    with receiver.connect() as sock:
        sock.sendall(b"hello")
        receiver.loop.after(0.05, receiver.loop.stop)
        receiver.loop.run()
    assert receiver.fds == []


def test_of_two_connections_the_second_is_closed_and_the_first_is_served(receiver: Receiver) -> None:
    with receiver.connect() as first, receiver.connect() as second:
        second.settimeout(5)
        receiver.loop.after(0.05, receiver.loop.stop)
        receiver.loop.run()
        assert second.recv(1) == b""
        slave, _ = send_terminal(first)
        receiver.console.finish()
    assert len(receiver.fds) == 1
    os.close(slave)


def test_only_one_descriptor_is_taken_and_the_others_are_closed(receiver: Receiver) -> None:
    before = settled_descriptors()
    with receiver.connect() as sock, open("/dev/null", "rb") as null:
        socket.send_fds(sock, [b"x"], [null.fileno()] * 3)
        receiver.run()
    assert len(receiver.fds) == 1
    assert len(descriptors()) == len(before) + 1


def test_only_root_may_connect(receiver: Receiver) -> None:
    assert os.stat(receiver.path).st_mode & 0o777 == 0o600


def test_a_path_too_long_for_a_socket_is_refused_by_name(tmp_path: Path) -> None:
    before = settled_descriptors()
    path = str(tmp_path / ("x" * MAX_PATH))
    loop = Loop()
    with pytest.raises(ValueError, match="longer than 107 bytes"):
        ConsoleSocket(loop, path, lambda fd: None)
    taken = tmp_path / "taken"
    taken.touch()
    with pytest.raises(OSError, match="in use"):
        ConsoleSocket(loop, str(taken), lambda fd: None)
    loop._epoll.close()
    assert descriptors() == before
