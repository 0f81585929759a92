"""Notices that a host has closed its connection, also while nothing is being read from it.

A forward whose target takes no more does not read the host's connection, and so would not see it close. The
kernel tells that to an epoll of its own, which the event loop watches as one descriptor: EPOLLRDHUP comes
without asking for input (epoll_ctl(2)).
"""

from __future__ import annotations

import asyncio
import contextlib
import select
from collections.abc import Callable


class Hangups:
    """The epoll is there while something is watched."""

    def __init__(self) -> None:
        self._epoll: select.epoll | None = None
        self._watched: dict[int, Callable[[], None]] = {}

    def watch(self, fd: int, gone: Callable[[], None]) -> None:
        """Calls ``gone`` once, from the loop, when the peer of ``fd`` has closed; until :meth:`forget`."""
        if self._epoll is None:
            self._epoll = select.epoll()
            asyncio.get_running_loop().add_reader(self._epoll.fileno(), self._look)
        self._watched[fd] = gone
        self._epoll.register(fd, select.EPOLLRDHUP | select.EPOLLONESHOT)

    def forget(self, fd: int) -> None:
        """To be called before ``fd`` is closed: another process holds it, too, so closing forgets nothing."""
        if self._watched.pop(fd, None) is None or self._epoll is None:
            return
        with contextlib.suppress(OSError):
            self._epoll.unregister(fd)
        if not self._watched:
            asyncio.get_running_loop().remove_reader(self._epoll.fileno())
            self._epoll.close()
            self._epoll = None

    def _look(self) -> None:
        for fd, _ in self._epoll.poll(0) if self._epoll is not None else ():
            gone = self._watched.get(fd)
            if gone is not None:
                gone()
