"""stdin, stdout and stderr of a process: pipes, each with one client at a time."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable

from gcsagent.agent.attachable import Attachable, Keeper, Load, drained
from gcsagent.agent.counters import queued
from gcsagent.agent.relay import CHUNK, MiddlePipe, Pump
from protocol.errors import Code, RpcError
from protocol.types import StreamMode, StreamState


class _PipeStream(Attachable):
    """One direction, one pump; ``_suffix`` names its middle pipe in the supervisor's store."""

    _suffix = ""

    def __init__(self, keeper: Keeper, name: str, fd: int, slot: int, ended: Callable[[int], None]) -> None:
        super().__init__(keeper, name, fd, ended)
        self._slot = slot
        self._middle: MiddlePipe | None = None
        self._pump: Pump | None = None

    def state(self) -> StreamState:
        return StreamState(StreamMode.STREAM, self._offset(), self.attached, self.ended)

    def begin_at(self, offset: int) -> None:
        """Counts from ``offset`` on; nothing has been moved yet."""
        self._keeper.counters.filling(self._slot, offset)

    @abstractmethod
    def _make_pump(self, middle: MiddlePipe) -> Pump: ...

    def _pumping(self) -> Pump:
        """The pump, made with its middle pipe when somebody first attaches."""
        if self._pump is None:
            self._middle = self._hold_middle(self._suffix)
            self._pump = self._make_pump(self._middle)
        return self._pump

    def _to_hold(self) -> dict[str, int]:
        if self._pump is not None or self.ended:
            return {}
        self._middle = MiddlePipe()
        self._pump = self._make_pump(self._middle)
        return self._names_of(self._middle, self._suffix)

    def _hold_nothing(self) -> None:
        if self._middle is not None:
            self._drop_middle(self._middle, self._suffix)
        self._middle = self._pump = None

    def _restore_middles(self, held: dict[str, int]) -> None:
        self._middle = self._held_middle(held, self._suffix)
        if self._middle is not None:
            self._pump = self._make_pump(self._middle)

    def _offset(self) -> int:
        return self._pump.delivered if self._pump else self._keeper.counters.delivered(self._slot, 0)

    def _blocked(self) -> float:
        return self._pump.blocked.seconds if self._pump else 0.0

    def _stop(self) -> None:
        if self._pump is not None:
            self._pump.detach()

    def _let_go(self) -> None:
        """What is left once nothing can attach any more."""
        if self._middle is not None:
            self._drop_middle(self._middle, self._suffix)
            self._middle = None
        self._free(self._slot)


class OutputStream(_PipeStream):
    """stdout or stderr: the read end of a pipe whose write end the process has."""

    _suffix = "out"

    def close_input(self, offset: int | None) -> None:
        raise RpcError(Code.INVALID_ARGUMENT, "this stream is an output")

    def closing_at(self) -> int | None:
        return None

    def produced(self) -> int:
        """Bytes the process has written so far: those delivered and those still in pipes."""
        waiting = queued(self._fd) if self._fd >= 0 else 0
        return self._offset() + (self._pump.in_middle if self._pump else 0) + waiting

    def waiting(self) -> int:
        """Bytes the process has written that have not reached a client."""
        return self.produced() - self._offset()

    def load(self) -> Load:
        return Load(self.waiting(), self._blocked())

    def move_rest(self, file: int) -> None:
        """Moves what waits to ``file``; to the client who comes it has never been there.

        The process has ended and nobody is attached. Raises OSError.
        """
        offset = self._offset()
        sources = [self._middle.read_end] if self._middle is not None else []
        for source in [*sources, *([self._fd] if self._fd >= 0 else [])]:
            while queued(source):
                os.splice(source, file, CHUNK, flags=os.SPLICE_F_NONBLOCK)
        self.begin_at(offset)
        if self._middle is not None:
            self._pump = self._make_pump(self._middle)

    def process_ended(self) -> None:
        """What it wrote stays in the pipe for whoever attaches; if there is nothing, this is the end."""
        in_middle = self._pump.in_middle if self._pump else 0
        if self._fd >= 0 and not self.attached and not in_middle and drained(self._fd):
            self._drop_fd()
            self._end(self._offset())

    def close(self) -> None:
        self.detach()
        self._drop_fd()
        self._let_go()

    def _make_pump(self, middle: MiddlePipe) -> Pump:
        return Pump(
            self._keeper.counters,
            self._slot,
            middle,
            on_source_end=self._on_source_end,
            on_sink_broken=lambda _code: self.detach(),
        )

    def _start(self, connection: int) -> None:
        self._pumping().attach(self._fd, connection)
        self._watch_peer()

    def _on_source_end(self, _code: int) -> None:
        self._drop_fd()
        self._end(self._offset())
        self._start_linger()


class InputStream(_PipeStream):
    """stdin: the write end of a pipe whose read end the process has."""

    _suffix = "in"

    def __init__(
        self, keeper: Keeper, name: str, fd: int, slot: int, ended: Callable[[int], None], once: bool
    ) -> None:
        super().__init__(keeper, name, fd, slot, ended)
        self._once = once
        self._close_at: int | None = None

    def close_input(self, offset: int | None) -> None:
        """Ends the process's stdin once ``offset`` bytes of it have reached the pipe; None: at once."""
        if self.ended:
            return
        self._close_at = self._offset() if offset is None else offset
        self._check_end(self._offset())

    def closing_at(self) -> int | None:
        """Where input is to end, once that is known and has not been reached."""
        return None if self.ended else self._close_at

    def end_at(self, offset: int) -> None:
        """The input is to end at ``offset``; :meth:`close_input` makes it so."""
        self._close_at = offset

    def load(self) -> Load:
        in_middle = self._pump.in_middle if self._pump else 0
        return Load(in_middle + (queued(self._fd) if self._fd >= 0 else 0), self._blocked())

    def consumed(self) -> int:
        """Bytes the process has read."""
        return self._offset() - (queued(self._fd) if self._fd >= 0 else 0)

    def produced(self) -> int:
        return self._offset()

    def process_ended(self) -> None:
        """Nobody reads any more (or a child still does, which is none of the client's business)."""
        self._finish()

    def close(self) -> None:
        self._finish()
        self._let_go()

    def detach(self) -> None:
        was_attached = self.attached
        super().detach()
        if was_attached and self._once and not self.ended:
            self._finish()

    def _make_pump(self, middle: MiddlePipe) -> Pump:
        return Pump(
            self._keeper.counters,
            self._slot,
            middle,
            on_source_end=lambda _code: self.detach(),
            on_sink_broken=lambda _code: self._finish(),
            on_progress=self._check_end,
        )

    def _start(self, connection: int) -> None:
        self._pumping().attach(connection, self._fd)

    def _check_end(self, delivered: int) -> None:
        if self._close_at is not None and delivered >= self._close_at:
            self._finish()

    def _finish(self) -> None:
        """Closes the pipe, which the process reads as end of file, and lets the client go."""
        if self.ended:
            return
        count = self._offset()
        self.ended = True
        super().detach()
        self._drop_fd()
        self._tell_end(count)
