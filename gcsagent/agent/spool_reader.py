"""One connection to a stream that is kept: it is sent what the spool has, from a position of its own on."""

from __future__ import annotations

import os
from typing import Protocol

from gcsagent.agent.attachable import Attachable, Keeper
from gcsagent.agent.spool import Spool

CHUNK = 1 << 20
ROUNDS = 16
"""Moves per wake-up, so that one busy stream does not keep the others waiting."""


class Source(Protocol):
    """The stream, as its readers see it."""

    ended: bool

    def progressed(self, reader: SpoolReader) -> None: ...
    def forget(self, reader: SpoolReader) -> None: ...


class SpoolReader(Attachable):
    """One connection, and how far it has come: the position of a description that the supervisor holds."""

    def __init__(self, keeper: Keeper, name: str, fd: int, spool: Spool, stream: Source) -> None:
        super().__init__(keeper, name, fd, lambda _count: None)
        self._spool, self._stream = spool, stream
        self._serving = self._waiting = False
        self._sink = -1
        self.position = position_of(fd)

    def wake(self) -> None:
        """There is more to send, or the end has come."""
        if self._serving and not self._waiting:
            self._run()

    def detach(self) -> None:
        was_attached = self.attached
        super().detach()
        if was_attached:
            self.give_up()

    def give_up(self) -> None:
        self._drop_fd()
        self._stream.forget(self)

    def _to_hold(self) -> dict[str, int]:
        return {self._name: self._fd}

    def _run(self) -> None:
        for _ in range(ROUNDS):
            left = self._spool.written - self.position
            if left == 0:
                self._await_writable(False)
                if self._stream.ended:
                    self._start_linger()
                return
            try:
                moved = os.sendfile(self._sink, self._fd, None, min(CHUNK, left))
            except BlockingIOError:
                break
            except OSError:
                self.detach()
                return
            self.position += moved
            self._stream.progressed(self)
        self._await_writable(True)

    def _await_writable(self, wanted: bool) -> None:
        if wanted == self._waiting:
            return
        self._waiting = wanted
        if wanted:
            self._loop.add_writer(self._sink, self._run)
        else:
            self._loop.remove_writer(self._sink)

    def _offset(self) -> int:
        return self.position

    def _start(self, connection: int) -> None:
        self._serving, self._sink = True, connection
        self._watch_peer()
        self._run()

    def _stop(self) -> None:
        self._await_writable(False)
        self._serving = False

    def _restore_middles(self, held: dict[str, int]) -> None:
        return


def position_of(fd: int) -> int:
    return os.lseek(fd, 0, os.SEEK_CUR)
