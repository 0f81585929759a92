"""Writes a small file, in the fewest calls there are: a process that starts and ends costs several."""

from __future__ import annotations

import os


def write_new(path: str, data: bytes) -> None:
    """Makes ``data`` the whole content of the file at ``path``. Raises OSError, having written some of it."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        written = os.write(fd, data)
        while written < len(data):
            written += os.write(fd, data[written:])
    finally:
        os.close(fd)
