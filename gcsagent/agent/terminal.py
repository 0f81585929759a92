"""The terminal of a process: a pty master, one duplex connection."""

from __future__ import annotations

import errno
import os
import termios
from collections.abc import Callable

from gcsagent.agent.attachable import Attachable, Keeper, Load, NullStream, Unattachable, drained
from gcsagent.agent.counters import queued
from gcsagent.agent.relay import MiddlePipe, Pump, PumpState
from protocol.errors import Code, RpcError
from protocol.types import StreamMode, StreamState


class TtyStream(Attachable):
    """A pty master: one connection, both directions."""

    def __init__(
        self, keeper: Keeper, name: str, fd: int, slots: tuple[int, int], ended: Callable[[int], None]
    ) -> None:
        super().__init__(keeper, name, fd, ended)
        self._slots = slots
        self._output: Pump | None = None
        self._input: Pump | None = None
        self._middles: list[tuple[MiddlePipe, str]] = []
        self._sink = -1  # where output goes now: the connection, or /dev/null
        self._over = self._hung_up = False
        self._eof_at: int | None = None

    def resize(self, rows: int, cols: int) -> None:
        """Raises FAILED_PRECONDITION when the terminal has ended."""
        if self._fd < 0:
            raise RpcError(Code.FAILED_PRECONDITION, "the terminal has ended")
        termios.tcsetwinsize(self._fd, (rows, cols))

    def close_input(self, offset: int | None) -> None:
        """Types the terminal's end-of-file character once ``offset`` bytes of input have reached it."""
        if self.ended:
            return
        self._eof_at = self._taken() if offset is None else offset
        self._check_eof(self._taken())

    def closing_at(self) -> int | None:
        return None if self.ended else self._eof_at

    def state(self) -> StreamState:
        return StreamState(StreamMode.STREAM, self._offset(), self.attached, self.ended)

    def produced(self) -> int:
        return self._offset() + (self._output.in_middle if self._output else 0)

    def waiting(self) -> int:
        """Bytes the process has written that have not reached a client."""
        unread = queued(self._fd) if self._fd >= 0 else 0
        return unread + (self._output.in_middle if self._output else 0)

    def load(self) -> Load:
        """Of its output."""
        return Load(self.waiting(), self._output.blocked.seconds if self._output else 0.0)

    def size(self) -> tuple[int, int] | None:
        """Rows and columns now; None when the terminal has ended."""
        return None if self._fd < 0 else termios.tcgetwinsize(self._fd)

    def taken(self) -> int:
        """Bytes of input that have reached the terminal."""
        return self._taken()

    def process_ended(self) -> None:
        """From now on EIO from the master is the end; if it has been seen already, it is looked at again."""
        self._over = True
        if self._hung_up and self._sink >= 0 and self._output is not None:
            self._output.attach(self._fd, self._sink)
        in_middle = self._output.in_middle if self._output else 0
        if self._fd >= 0 and self._sink < 0 and not self.attached and not in_middle and drained(self._fd):
            self._drop_fd()
            self._end(self._offset())

    def close(self) -> None:
        self.detach()
        self._stop()
        self._drop_fd()
        self._drop_middles()
        self._free(*self._slots)

    def _offset(self) -> int:
        return self._output.delivered if self._output else self._keeper.counters.delivered(self._slots[0], 0)

    def _taken(self) -> int:
        return self._input.delivered if self._input else self._keeper.counters.delivered(self._slots[1], 0)

    def discard_into(self, null: int) -> None:
        """Moves all output to ``null``, an open /dev/null, from now on."""
        if self._output is None or self._input is None:
            self._output, self._input = self._make_pumps(self._hold_middle("out"), self._hold_middle("in"))
        self._sink = null
        if not self.ended:
            self._output.attach(self._fd, null)

    def _start(self, connection: int) -> None:
        if self._output is None or self._input is None:
            self._output, self._input = self._make_pumps(self._hold_middle("out"), self._hold_middle("in"))
        self._sink = connection
        self._output.attach(self._fd, connection)
        self._input.attach(connection, self._fd)

    def _restore_middles(self, held: dict[str, int]) -> None:
        out, into = self._held_middle(held, "out"), self._held_middle(held, "in")
        if out is not None or into is not None:
            # With one of them missing nothing had been moved either way: both are held before any byte is.
            self._output, self._input = self._make_pumps(
                out or self._hold_middle("out"), into or self._hold_middle("in")
            )

    def _to_hold(self) -> dict[str, int]:
        if self._output is not None:
            return {}
        out, into = MiddlePipe(), MiddlePipe()
        self._output, self._input = self._make_pumps(out, into)
        return self._names_of(out, "out") | self._names_of(into, "in")

    def _hold_nothing(self) -> None:
        self._drop_middles()
        self._output = self._input = None

    def _drop_middles(self) -> None:
        for middle, suffix in self._middles:
            self._drop_middle(middle, suffix)
        self._middles.clear()

    def _make_pumps(self, out: MiddlePipe, into: MiddlePipe) -> tuple[Pump, Pump]:
        self._middles = [(out, "out"), (into, "in")]
        counters, (out_slot, in_slot) = self._keeper.counters, self._slots
        output = Pump(
            counters,
            out_slot,
            out,
            on_source_end=self._on_hangup,
            on_sink_broken=lambda _code: self.detach(),
        )
        incoming = Pump(
            counters,
            in_slot,
            into,
            on_source_end=lambda _code: self.detach(),
            on_sink_broken=self._on_input_broken,
            on_progress=self._check_eof,
        )
        return output, incoming

    def _stop(self) -> None:
        self._sink = -1
        for pump in (self._output, self._input):
            if pump is not None:
                pump.detach()

    def _on_hangup(self, _code: int) -> None:
        """The last slave was closed and everything written to it has been delivered.

        A process closes its descriptors a moment before it has ended (cat does so itself, to see whether
        that fails). Closing the master then would hang the terminal up, and SIGHUP would become the
        process's end instead of its exit status: so the master stays until the process is gone.
        """
        if self._input is not None:
            self._input.detach()
        if not self._over:
            self._hung_up = True
            self._watch_peer()
            return
        self._drop_fd()
        self._end(self._offset())
        self._start_linger()
        self._watch_peer()

    def _on_input_broken(self, code: int) -> None:
        """Input to a hung-up terminal fails with EIO; its output may still be on the way out."""
        if code != errno.EIO or self._output is None or self._output.state is not PumpState.ATTACHED:
            self.detach()

    def _check_eof(self, taken: int) -> None:
        if self._eof_at is None or taken < self._eof_at or self._fd < 0:
            return
        self._eof_at = None
        character = termios.tcgetattr(self._fd)[6][termios.VEOF]
        try:
            os.write(self._fd, character)
        except BlockingIOError:
            self._loop.add_writer(self._fd, self._retry_eof, character)
        except OSError:
            return  # hung up: there is nobody to tell

    def _retry_eof(self, character: bytes) -> None:
        if self._fd < 0:
            return
        self._loop.remove_writer(self._fd)
        try:
            os.write(self._fd, character)
        except OSError:
            return


class DiscardedTty(Unattachable):
    """A terminal in mode null: what the process writes to it is dropped, as /dev/null would."""

    refusal = NullStream.refusal

    def __init__(self, tty: TtyStream) -> None:
        self.tty = tty
        self._null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        tty.discard_into(self._null)

    def settled(self) -> bool:
        return self.tty.settled()

    def idle_since(self) -> float | None:
        return self.tty.idle_since()

    def resize(self, rows: int, cols: int) -> None:
        self.tty.resize(rows, cols)

    def close_input(self, offset: int | None) -> None:
        self.tty.close_input(None)

    def closing_at(self) -> int | None:
        return self.tty.closing_at()

    def state(self) -> StreamState:
        return StreamState(StreamMode.NULL, self.tty.state().bytes, False, self.tty.ended)

    def produced(self) -> int:
        return self.tty.produced()

    def process_ended(self) -> None:
        self.tty.process_ended()

    def close(self) -> None:
        self.tty.close()
        if self._null >= 0:
            os.close(self._null)
            self._null = -1
