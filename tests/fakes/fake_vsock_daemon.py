"""Stands in for vhost-device-vsock: makes the two sockets its `--vm` argument names and takes one connection.

Behind the hybrid one an agent answers every hello. With FAKE_VSOCK=refuse it complains and exits; with
FAKE_VSOCK=die it exits once QEMU has connected; with FAKE_VSOCK=deaf no port of the guest answers. The real
one can lose the thread that serves hosts: SIGUSR1 has it do so with a word, and SIGUSR2 without.
"""

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from protocol.connection import Connection, Role
from protocol.families.agent import Welcome
from protocol.framing import Request
from protocol.schema import to_wire

PANIC = b"""
thread 'vring_worker' (42) panicked at src/vsock_conn.rs:238:64:
called `Result::unwrap()` on an `Err` value: Os { code: 32, kind: BrokenPipe }
note: run with `RUST_BACKTRACE=1` environment variable to display a backtrace
"""


class Worker:
    """Does nothing but live."""

    def __init__(self, lost: Path) -> None:
        self.lost = lost
        self.ending = threading.Event()
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    def work(self) -> None:
        ctypes.CDLL(None).prctl(15, b"vring_worker")  # PR_SET_NAME
        self.ending.wait()

    def lose(self, word: bytes) -> None:
        os.write(2, word)
        self.ending.set()
        self.thread.join()
        self.lost.touch()


def greet(host: socket.socket) -> None:
    """As the daemon takes CONNECT, and as an agent takes hello."""
    with host, host.makefile("rb", buffering=0) as lines:
        lines.readline()
        host.sendall(b"OK 1024\n")
        connection = Connection(Role.SERVER)
        while data := host.recv(65536):
            for message in connection.receive(data):
                assert isinstance(message, Request)
                host.sendall(connection.respond(message.msgid, to_wire(Welcome(1, "fake", "boot", 1))))


def answer(hybrid: socket.socket) -> None:
    while True:
        host, _ = hybrid.accept()
        greet(host)


def main() -> None:
    options = dict(word.split("=", 1) for word in sys.argv[sys.argv.index("--vm") + 1].split(","))
    mode = os.environ.get("FAKE_VSOCK", "")
    worker = Worker(Path(options["socket"]).with_name("lost"))
    signal.signal(signal.SIGUSR1, lambda *_: worker.lose(PANIC))
    signal.signal(signal.SIGUSR2, lambda *_: worker.lose(b""))
    if mode == "refuse":
        sys.exit("vhost-device-vsock: no such thing")
    with (
        socket.socket(socket.AF_UNIX) as hybrid,
        socket.socket(socket.AF_UNIX) as control,
    ):
        hybrid.bind(options["uds-path"])
        hybrid.listen()
        if mode != "deaf":
            threading.Thread(target=answer, args=(hybrid,), daemon=True).start()
        control.bind(options["socket"])
        control.listen()
        connection, _ = control.accept()
        if mode == "die":
            sys.exit("vhost-device-vsock: lost my mind")
        with connection:
            time.sleep(600)


main()
