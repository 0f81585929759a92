"""A runtime that starts one process and writes its pid file, in the ways real ones do and in worse ones.

usage: fake_runtime.py WAY PID_FILE [ARGUMENT]

The process is given away by a double fork, so that it is the supervisor's child. What a test waits for is
said on standard output, one line each.
"""

import os
import select
import signal
import socket
import sys


def start(status: int | None) -> tuple[int, int]:
    """A process with another parent, and its pidfd. It ends with ``status``, or lives until killed."""
    read_end, write_end = os.pipe()
    hold_read, hold_write = os.pipe()
    middle = os.fork()
    if middle == 0:
        if os.fork():
            os._exit(0)
        os.setsid()  # before anybody hears of it: a runtime is killed with its process group
        os.write(write_end, str(os.getpid()).encode())
        os.close(hold_write)
        os.read(hold_read, 1)  # until its pidfd is open
        if status is None:
            signal.pause()
        os._exit(status or 0)
    os.waitpid(middle, 0)
    pid = int(os.read(read_end, 32))
    pidfd = os.pidfd_open(pid)
    os.close(hold_write)
    return pid, pidfd


def until_dead(pidfd: int) -> None:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.poll()


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def say(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def main(way: str, pid_file: str, argument: str = "") -> int:
    if way == "live":
        pid, _ = start(None)
        write(pid_file, str(pid))
    elif way == "dead":  # it has ended, and been seen to, before anybody knows its pid
        pid, pidfd = start(int(argument))
        until_dead(pidfd)
        say("dead", pid)
        write(pid_file, str(pid))
    elif way == "hold":  # something ends while we run; we name nobody, or it, when told to go on
        pid, pidfd = start(9)
        until_dead(pidfd)
        say("dead", pid)
        go = os.open(argument, os.O_RDONLY)
        answer = os.read(go, 10)
        if answer == b"name":
            write(pid_file, str(pid))
    elif way == "hang":  # after the pid file, as a runtime killed by its deadline may have come
        pid, _ = start(None)
        write(pid_file, str(pid))
        say("hanging", pid)
        signal.pause()
    elif way == "text":
        write(pid_file, argument)
    elif way == "console":
        master, _ = os.openpty()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.connect(argument)
            socket.send_fds(sock, [b"/dev/ptmx"], [master])
        pid, _ = start(None)
        write(pid_file, str(pid))
    elif way == "fail":
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
