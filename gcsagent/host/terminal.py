"""The local terminal: raw while a remote one is shown on it, and what it was before afterwards."""

from __future__ import annotations

import contextlib
import os
import signal
import termios
import tty
from collections.abc import Iterator

from gcsagent.host.signalling import handled
from protocol.types import Winsize

_MAX_SIDE = 65535


@contextlib.contextmanager
def raw(fd: int) -> Iterator[None]:
    """Raw mode on the terminal ``fd``; on anything else, nothing. Restored however the block is left.

    Who stops us (``kill -TSTP``) gives the terminal to a shell, which leaves it in another mode.
    """
    try:
        saved = termios.tcgetattr(fd)
    except (termios.error, OSError):
        yield
        return
    try:
        # TCSADRAIN would wait for output that a stopped terminal (Ctrl-S) never takes.
        tty.setraw(fd, termios.TCSANOW)
        with handled((signal.SIGCONT,), lambda _: _set_raw(fd)):
            yield
    finally:
        with contextlib.suppress(termios.error, OSError):  # the terminal may be gone: SIGHUP
            termios.tcsetattr(fd, termios.TCSANOW, saved)


def _set_raw(fd: int) -> None:
    with contextlib.suppress(termios.error, OSError):
        tty.setraw(fd, termios.TCSANOW)


def winsize(*fds: int) -> Winsize | None:
    """The size of the first of ``fds`` that is a terminal and knows one."""
    for fd in fds:
        with contextlib.suppress(OSError):
            size = os.get_terminal_size(fd)
            if size.lines > 0 and size.columns > 0:
                return Winsize(min(size.lines, _MAX_SIDE), min(size.columns, _MAX_SIDE))
    return None
