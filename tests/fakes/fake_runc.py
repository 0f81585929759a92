#!/usr/bin/python3 -IS
"""runc with one fault: everything goes to the real one, but for what a test has asked for.

A copy of this file is the agent's runtime. Beside it, ``faults/<command>.<container>`` (of an exec
``faults/exec.<process>``) says in words what is to go wrong with that call; without such a file nothing does.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

REAL = "/usr/sbin/runc:/usr/bin/runc:/usr/local/sbin/runc"
MIB = 1 << 20

argv = sys.argv[1:]
command = next(
    (word for word in argv if re.fullmatch("create|start|exec|delete|pause|resume|update", word)), ""
)
container = argv[-1]


def option(name: str) -> str:
    return argv[argv.index(name) + 1] if name in argv else ""


def real() -> str:
    return next(path for path in REAL.split(":") if os.access(path, os.X_OK))


def go_on() -> None:
    os.execv(real(), ["runc", *argv])


def do(words: list[str] = argv) -> None:
    """The real thing, to its end, its process given away to whoever adopts ours."""
    status = subprocess.run([real(), *words], close_fds=False, check=False).returncode
    if status:
        sys.exit(status)


def log(data: bytes) -> None:
    with open(option("--log"), "ab") as file:
        file.write(data)


def entry(level: str, message: str) -> bytes:
    return json.dumps({"level": level, "msg": message, "time": "now"}).encode() + b"\n"


def write_pid(text: object) -> None:
    with open(option("--pid-file"), "w") as file:
        file.write(str(text))


def without(name: str) -> list[str]:
    at = argv.index(name)
    return argv[:at] + argv[at + 2 :]


def sleeper() -> int:
    """A process in a session of its own, adopted by the supervisor when we end."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        for fd in range(3):
            os.dup2(os.open("/dev/null", os.O_RDWR), fd)
        os.execvp("sleep", ["sleep", "100000"])
    return pid


def dead() -> int:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


def hang() -> None:
    while True:
        time.sleep(1000)


LOGS = {
    "binary": bytes(range(256)) * 1000,
    "huge-line": b'{"level": "error", "msg": "' + b"x" * (10 * MIB) + b'"}\n',
    "long-words": entry("error", "many words " * 4000),
    "many-lines": (entry("info", "nothing much") * 20_000)[: 10 * MIB] + entry("error", "at the very end"),
    "stale-success": entry("error", "the cause") + entry("info", "all is well"),
    "deep": b"[" * 60_000 + b"\n",
    "surrogate": b'{"level": "error", "msg": "half \\ud800 of a pair"}\n',
    "no-object": b'[1]\n"error"\nnull\n{"level": "error", "msg": {"a": "map"}}\n{"level": 3}\n',
    "lines": entry("error", "first line\nsecond line\x1b[31m red"),
}


def fault(name: str, argument: str = "") -> None:
    if name == "log":
        log(LOGS[argument])
        sys.exit(1)
    elif name == "log-is":
        os.mkfifo(option("--log")) if argument == "fifo" else os.mkdir(option("--log"))
        sys.exit(1)
    elif name == "exit":
        sys.exit(int(argument))
    elif name == "stderr":
        os.write(2, b"some words\nruntime: the last line\n")
        sys.exit(3)
    elif name == "flood":
        try:
            for _ in range(100):
                os.write(2, b"x" * (MIB - 1) + b"\n")
        except OSError:
            log(entry("error", "nobody takes it"))
        sys.exit(1)
    elif name == "signal":
        os.kill(os.getpid(), getattr(signal, argument))
        signal.pause()
    elif name == "hang":
        log(entry("error", "about to hang"))
        if argument in ("deaf", "children"):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if argument == "children" and os.fork() == 0:
            log(b"")
            hang()
        if argument == "done":
            do()
        hang()
    elif name == "done-then":
        do()
        fault(*argument.split(":"))
    elif name == "children":
        if os.fork() == 0:
            hang()
        log(entry("error", "children live on"))
        sys.exit(1)
    elif name == "no-pid-file":
        do(without("--pid-file"))
    elif name == "pid":
        do()
        write_pid(dead() if argument == "dead" else argument)
    elif name == "break-state":
        do()
        state = os.path.join(option("--root"), container, "state.json")
        with open(state, "r+b") as file:
            file.truncate({"cut": 100, "empty": 0}.get(argument, 0))
            if argument == "rubbish":
                file.write(b"\0\xff{[" * 100)
            elif argument == "shape":
                file.write(b"{}")
        if argument == "gone":
            os.unlink(state)
    elif name == "console":
        pid = sleeper()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            if argument != "never":
                sock.connect(option("--console-socket"))
            if argument == "two":
                socket.send_fds(sock, [b"x"], [os.openpty()[0], os.openpty()[0]])
            elif argument == "file":
                socket.send_fds(sock, [b"x"], [os.open("/etc/hostname", os.O_RDONLY)])
            elif argument == "bytes":
                sock.send(b"no descriptor here")
        write_pid(pid)
    elif name == "nothing":
        pass
    else:
        sys.exit(f"fake_runc: {name}?")


def asked() -> list[str]:
    here = os.path.join(os.path.dirname(os.path.realpath(__file__)), "faults")
    process = os.path.basename(os.path.dirname(option("--pid-file"))).removeprefix(".new-")
    try:
        with open(os.path.join(here, f"{command}.{process if command == 'exec' else container}")) as file:
            return file.read().split()
    except FileNotFoundError:
        return []


words = asked()
if words:
    fault(*words)
else:
    go_on()
