"""Moves the bytes of one direction of a stream: source -> middle pipe -> sink, in the kernel.

No byte is ever in this process's memory, so none can be lost with it. The middle pipe is there because a
pty cannot be spliced to a socket, and because "fill only when empty" makes the count exact (counters).

A pump reads the source only while it has a sink that takes bytes: back-pressure is not reading. It does a
bounded amount of work per wake-up, so that one busy stream does not keep the others waiting.

    ATTACHED   source is watched, or, once the sink has been full, the sink until the source is found empty
    IDLE       no sink or no source: nothing is watched, nothing is moved
    ENDED      the source is at its end and the middle pipe is empty; or the sink is gone for good
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
from collections.abc import Callable
from enum import Enum

from gcsagent.agent.counters import CounterSlots, queued
from gcsagent.agent.stopwatch import Stopwatch

CHUNK = 1 << 20
"""Bytes asked of one splice; what comes is at most what the pipes hold."""

ROUNDS = 16
"""Fill-and-drain rounds per wake-up."""

SMALL, LARGE = 64 * 1024, 256 * 1024
"""What a pipe holds (pipe(7)), and what it is made to hold once a splice has filled it: a stream that comes
faster than we do gets more moved in each round. Beyond this it would not stay in a processor's cache."""

TURN = 1 << 20
"""Bytes after which others have their turn."""

_FLAGS = os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE


class PumpState(Enum):
    IDLE = "idle"
    ATTACHED = "attached"
    ENDED = "ended"


class MiddlePipe:
    """The pipe between source and sink; both ends stay with the stream from attach to attach."""

    __slots__ = ("read_end", "write_end")

    def __init__(self, ends: tuple[int, int] | None = None) -> None:
        self.read_end, self.write_end = ends or os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def close(self) -> None:
        os.close(self.read_end)
        os.close(self.write_end)


class Pump:
    """``source_ended`` and ``sink_broken`` are each called at most once per attachment, from the loop.

    The descriptors stay their owner's. Exactly one of ``source`` and ``sink`` is the client's connection,
    and comes and goes with :meth:`attach` and :meth:`detach`.
    """

    __slots__ = (
        "_counters",
        "_loop",
        "_mark",
        "_middle",
        "_on_progress",
        "_on_sink_broken",
        "_on_source_end",
        "_pending",
        "_room",
        "_sink",
        "_slot",
        "_source",
        "_watching_sink",
        "_watching_source",
        "blocked",
        "state",
    )

    def __init__(
        self,
        counters: CounterSlots,
        slot: int,
        middle: MiddlePipe,
        *,
        on_source_end: Callable[[int], None],
        on_sink_broken: Callable[[int], None],
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        """The callbacks get errno (0 for a plain end of file); ``on_progress`` gets the total delivered."""
        self._loop = asyncio.get_running_loop()
        self._counters, self._slot, self._middle = counters, slot, middle
        self._on_source_end, self._on_sink_broken = on_source_end, on_sink_broken
        self._on_progress = on_progress
        self._source = self._sink = -1
        self._watching_sink = self._watching_source = False
        self.blocked = Stopwatch()
        self._room = SMALL
        self._pending = queued(middle.read_end)  # bytes in the middle pipe, kept without asking each time
        self._mark = counters.delivered(slot, self._pending) + self._pending
        self.state = PumpState.IDLE

    @property
    def delivered(self) -> int:
        """Bytes that have reached the sink, over all attachments."""
        return self._mark - self._pending

    @property
    def in_middle(self) -> int:
        """Bytes taken from the source that have not reached the sink."""
        return self._pending

    @property
    def waits_for_sink(self) -> bool:
        """Whether the loop calls it, and nobody else, when the sink has room."""
        return self._watching_sink

    def attach(self, source: int, sink: int) -> None:
        """Starts moving; what an earlier attachment left in the middle pipe goes first."""
        self._source, self._sink = source, sink
        self.state = PumpState.ATTACHED
        if self._pending:
            self._counters.draining(self._slot, self._mark)
            self._watch_sink()
        else:
            self._counters.filling(self._slot, self._mark)
            self._watch_source()

    def detach(self) -> None:
        """Stops. Idempotent; what is in the middle pipe stays there."""
        if self.state is not PumpState.ATTACHED:
            return
        self._unwatch()
        self.blocked.stop()
        self.state = PumpState.IDLE
        self._source = self._sink = -1

    # -- moving ---------------------------------------------------------------------------------

    def _run(self) -> None:
        before = self.delivered
        for _ in range(ROUNDS):
            if not (self._drain() if self._pending else self._fill()):
                break
            if self._mark - before >= TURN:
                break
        if self._on_progress is not None and self.delivered != before:
            self._on_progress(self.delivered)

    def _fill(self) -> bool:
        """Source -> middle pipe -> sink; False when there is nothing more to do in this wake-up."""
        try:
            moved = os.splice(self._source, self._middle.write_end, CHUNK, flags=_FLAGS)
        except BlockingIOError:
            self._watch_source()
            return False
        except OSError as error:
            # A pty whose last slave was closed answers EIO, after its last byte (pty(7)).
            self._finish(self._on_source_end, 0 if error.errno == errno.EIO else error.errno or 0)
            return False
        if moved == 0:
            self._finish(self._on_source_end, 0)
            return False
        self._mark += moved
        self._pending = moved
        self._counters.draining(self._slot, self._mark)
        if moved >= self._room:
            self._room = LARGE
            for pipe in (self._middle.write_end, self._source, self._sink):
                enlarge(pipe)
        return self._drain()

    def _drain(self) -> bool:
        """Middle pipe -> sink, until it is empty; False when the sink takes no more now."""
        while self._pending:
            try:
                moved = os.splice(self._middle.read_end, self._sink, CHUNK, flags=_FLAGS)
            except BlockingIOError:
                self._watch_sink()
                return False
            except OSError as error:
                self._finish(self._on_sink_broken, error.errno or 0)
                return False
            self._pending -= moved
        self._counters.filling(self._slot, self._mark)
        self.blocked.stop()
        return True

    def _finish(self, callback: Callable[[int], None], code: int) -> None:
        self._unwatch()
        self.blocked.stop()
        self.state = PumpState.ENDED
        callback(code)

    # -- watching -------------------------------------------------------------------------------

    def _watch_source(self) -> None:
        if not self._watching_source:
            self._unwatch()
            self._watching_source = True
            self._loop.add_reader(self._source, self._run)

    def _watch_sink(self) -> None:
        self.blocked.start()
        if not self._watching_sink:
            self._unwatch()
            self._watching_sink = True
            self._loop.add_writer(self._sink, self._run)

    def _unwatch(self) -> None:
        if self._watching_sink:
            self._watching_sink = False
            self._loop.remove_writer(self._sink)
        elif self._watching_source:
            self._watching_source = False
            self._loop.remove_reader(self._source)


def enlarge(fd: int) -> None:
    """What is no pipe, or may not grow for a limit on pipe pages (pipe(7)), stays as it is."""
    try:
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, LARGE)
    except OSError:
        return
