"""Files in which the kernel keeps a state and says when it has changed, as cgroup v2's ``*.events`` do.

Such a file is ready with EPOLLPRI from a change until it is read again (cgroup-v2.rst). asyncio waits for
readable and writable only, so all of them are in one epoll of their own, which is readable when one is ready.
"""

from __future__ import annotations

import asyncio
import os
import select
from collections.abc import Callable

_SIZE = 4096


class KernelFiles:
    def __init__(self) -> None:
        self._changed: dict[int, Callable[[], None]] = {}
        self._epoll = select.epoll()
        asyncio.get_running_loop().add_reader(self._epoll.fileno(), self._on_ready)

    def watch(self, path: str, changed: Callable[[], None]) -> int:
        """Calls ``changed`` after every change from now on, until :meth:`forget` gets the returned number.

        Changes in quick succession may be one call. Raises OSError.
        """
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.pread(fd, _SIZE, 0)
            self._epoll.register(fd, select.EPOLLPRI)
        except OSError:
            os.close(fd)
            raise
        self._changed[fd] = changed
        return fd

    def forget(self, watch: int) -> None:
        if self._changed.pop(watch, None) is not None:
            os.close(watch)  # which takes it out of the epoll

    def _on_ready(self) -> None:
        for fd, _ in self._epoll.poll(0):
            changed = self._changed.get(fd)
            if changed is None:
                continue  # forgotten by a callback before this one
            try:
                os.pread(fd, _SIZE, 0)
            except OSError:  # the cgroup is gone: it would be ready for ever
                self.forget(fd)
            changed()
