"""One PSI trigger among the event loop's descriptors (accounting/psi.rst).

It is ready with EPOLLPRI, which asyncio does not wait for, and whoever polls it has taken what there was:
an epoll with several of them, in the loop's own, would be woken and find nothing. So each has an epoll to
itself, and that this is readable says it all.
"""

from __future__ import annotations

import asyncio
import os
import select
from collections.abc import Callable

_SIZE = 4096


class Trigger:
    def __init__(self, fd: int, pressed: Callable[[], None], gone: Callable[[], None]) -> None:
        """``fd`` is a pressure file with a threshold written to it, and this object's from now on.

        ``pressed`` is called for what has happened since it was last polled, also by an earlier process, and
        ``gone`` once there will be no more because its cgroup has been removed.
        """
        self.fd = fd
        self._pressed, self._gone = pressed, gone
        self._epoll = select.epoll()
        self._epoll.register(fd, select.EPOLLPRI)
        self._loop = asyncio.get_running_loop()
        if self._epoll.poll(0):
            self._loop.call_soon(self._ready)  # putting it into the loop's epoll would take it
        self._loop.add_reader(self._epoll.fileno(), self._ready)

    def read(self) -> str:
        """The pressure file's contents. Raises OSError once the cgroup is gone."""
        return os.pread(self.fd, _SIZE, 0).decode(errors="replace")

    def close(self) -> None:
        if not self._epoll.closed:
            self._loop.remove_reader(self._epoll.fileno())
            self._epoll.close()
            os.close(self.fd)

    def _ready(self) -> None:
        if self._epoll.closed:
            return
        self._epoll.poll(0)
        try:
            self.read()
        except OSError:
            self._gone()
        else:
            self._pressed()
