"""Keeps the lock of one of its standard pipes, or has a child that does: usage: pipe_holder.py FD [child].

splice(2) from a socket into a pipe waits for the socket with the pipe's lock in its hands, and whoever reads
that pipe, asks what is in it or closes its last descriptor waits for the lock, out of any signal's reach.
Says "held" on standard error when it is so.
"""

import os
import signal
import socket
import sys

MOST_SECONDS = 120
"""However a test ends, what waits for the lock must not wait for ever."""


def hold(number: int, begun: int) -> None:
    signal.alarm(MOST_SECONDS)
    ours, _theirs = socket.socketpair()
    pipe = os.open(f"/proc/self/fd/{number}", os.O_WRONLY)
    os.close(begun)
    os.splice(ours.fileno(), pipe, 4096)


def watch(pid: int, begun: int) -> None:
    os.read(begun, 1)
    while True:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            if file.read().rpartition(")")[2].split()[0] == "S":
                break
    os.write(2, b"held\n")
    signal.pause()


def main(number: int, by_child: bool) -> None:
    begun, tell = os.pipe()
    parent, child = os.getpid(), os.fork()
    if bool(child) is by_child:
        os.close(tell)
        watch(child or parent, begun)
    hold(number, tell)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:] == ["child"])
