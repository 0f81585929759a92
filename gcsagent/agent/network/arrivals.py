"""Tells when something about the interfaces of the agent's own namespace has changed (rtnetlink(7))."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from types import TracebackType
from typing import Self

RTMGRP_LINK = 1
MESSAGE = 64 * 1024


class LinkWatch:
    """Opened before looking, so that what comes between looking and waiting is not missed."""

    def __enter__(self) -> Self:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, 0
        )
        self._socket.bind((0, RTMGRP_LINK))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    async def changed(self) -> None:
        """Returns when anything has changed; what is said about it is left for looking."""
        try:
            await asyncio.get_running_loop().sock_recv(self._socket, MESSAGE)
        except OSError as error:
            if error.errno != errno.ENOBUFS:  # more has changed than the socket holds
                raise
        with contextlib.suppress(BlockingIOError):
            while True:  # one look is enough for all that has been said until now
                self._socket.recv(MESSAGE)
