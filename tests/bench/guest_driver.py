"""Runs in the guest, with its Python and nothing but the standard library: baselines, timed where they run.

A line of JSON in, a line of JSON out. ``run``: seconds until the last of ``count`` runs of ``argv`` at once
has ended, output into pipes. ``ready``: seconds until ``argv`` says READY=1 (sd_notify(3)); it is ended then.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

NOTIFY = "/run/bench/notify"


def start(argv: list[str], env: Mapping[str, str]) -> tuple[int, int]:
    """Its pid and the pipe of its output."""
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
        (os.POSIX_SPAWN_DUP2, write_end, 1),
        (os.POSIX_SPAWN_DUP2, write_end, 2),
    ]
    try:
        return os.posix_spawnp(argv[0], argv, env, file_actions=actions), read_end
    finally:
        os.close(write_end)


def finish(pid: int, output: int) -> None:
    said = b""
    while data := os.read(output, 65536):
        said += data
    os.close(output)
    status = os.waitpid(pid, 0)[1]
    if status:
        raise RuntimeError(f"status {status}: {said[-400:].decode(errors='replace')}")


def run(argv: list[str], count: int = 1) -> float:
    began = time.perf_counter()
    for pid, output in [start(argv, os.environ) for _ in range(count)]:
        finish(pid, output)
    return time.perf_counter() - began


def ready(argv: list[str]) -> float:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.settimeout(120)
        notify.bind(NOTIFY)
        try:
            began = time.perf_counter()
            pid, output = start(argv, {**os.environ, "NOTIFY_SOCKET": NOTIFY})
            while b"READY=1" not in notify.recv(4096):
                pass
            took = time.perf_counter() - began
        finally:
            os.unlink(NOTIFY)
    os.kill(pid, signal.SIGTERM)
    finish(pid, output)
    return took


COMMANDS: dict[str, Callable[..., float]] = {"run": run, "ready": ready}

for line in sys.stdin:
    wanted = json.loads(line)
    answer: dict[str, Any]
    try:
        answer = {"seconds": COMMANDS[wanted.pop("command")](**wanted)}
    except Exception as error:
        answer = {"error": repr(error)}
    print(json.dumps(answer), flush=True)
