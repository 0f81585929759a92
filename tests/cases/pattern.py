"""Bytes that both sides can make: no two blocks are alike, so that a lost or repeated one shows.

The guest's python3 gets this file's source (:data:`SOURCE`); it must not import anything of ours.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import random
import sys
import threading

BLOCK = 1 << 16


def block(seed: int, number: int) -> bytes:
    """Block ``number`` of the stream ``seed``."""
    return number.to_bytes(8, "big") + random.Random(seed).randbytes(BLOCK - 8)


def write(fd: int, seed: int, size: int) -> None:
    """``size`` bytes of the stream ``seed`` to ``fd``."""
    rest = random.Random(seed).randbytes(BLOCK - 8)
    for number in range(-(-size // BLOCK)):
        data = (number.to_bytes(8, "big") + rest)[: size - number * BLOCK]
        while data:
            data = data[os.write(fd, data) :]


def write_both(size: int) -> None:
    """Stream 1 to stdout and stream 2 to stderr, at once."""
    other = threading.Thread(target=write, args=(2, 2, size))
    other.start()
    write(1, 1, size)
    other.join()


def take(seed: int, start: int, end: int) -> bytes:
    """Bytes ``start`` to ``end`` of the stream ``seed``."""
    first = start // BLOCK
    blocks = b"".join(block(seed, number) for number in range(first, -(-end // BLOCK)))
    return blocks[start - first * BLOCK : end - first * BLOCK]


def digest(seed: int, size: int) -> str:
    """SHA-256 of the first ``size`` bytes of the stream ``seed``."""
    total = hashlib.sha256()
    rest = random.Random(seed).randbytes(BLOCK - 8)
    for number in range(-(-size // BLOCK)):
        total.update((number.to_bytes(8, "big") + rest)[: size - number * BLOCK])
    return total.hexdigest()


SOURCE = inspect.getsource(sys.modules[__name__]).partition("\nSOURCE = ")[0]


def command(call: str) -> list[str]:
    """The command line that makes ``call`` in a container that has a python3."""
    return ["python3", "-I", "-S", "-c", f"{SOURCE}\n{call}"]
