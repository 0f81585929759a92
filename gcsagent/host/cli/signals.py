"""Signals to gcsctl while it runs something: passed on to the process, or the cause of an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from types import TracebackType
from typing import Self

from gcsagent.host.errors import HostError
from gcsagent.host.process import RemoteProcess
from gcsagent.host.signalling import handled
from gcsagent.host.vm.errors import Interrupted
from protocol.errors import RpcError

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
FORWARDED = (*ENDING, signal.SIGUSR1, signal.SIGUSR2)

_PATIENCE = 3
"""The third ending signal kills the process: a container's init ignores what it has no handler for."""


class Signals:
    """While in its ``with`` block an ending signal cancels the task, and the block raises Interrupted.

    Once :meth:`forward_to` has been told a process, it gets the signals instead.
    """

    def __init__(self) -> None:
        self._process: RemoteProcess | None = None
        self._task: asyncio.Task[object] | None = None
        self._received: signal.Signals | None = None
        self._endings = 0
        self._sending: set[asyncio.Task[None]] = set()
        self._handled = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._task = asyncio.current_task()
        self._handled.enter_context(handled(FORWARDED, self._take))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handled.close()
        for task in self._sending:
            task.cancel()
        if kind is asyncio.CancelledError and self._received is not None:
            raise Interrupted(self._received) from None

    def forward_to(self, process: RemoteProcess) -> None:
        self._process = process

    def _take(self, number: signal.Signals) -> None:
        self._endings += number in ENDING
        if self._process is not None and self._endings <= _PATIENCE:
            passed_on = signal.SIGKILL if self._endings == _PATIENCE else number
            sending = asyncio.create_task(_send(self._process, passed_on))
            self._sending.add(sending)
            sending.add_done_callback(self._sending.discard)
        elif number in ENDING:
            self._received = number
            assert self._task is not None
            self._task.cancel()


async def _send(process: RemoteProcess, number: signal.Signals) -> None:
    with contextlib.suppress(RpcError, HostError):  # it has just ended, or the wait will say what is wrong
        await process.kill(number.name)
