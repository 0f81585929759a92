"""The terminal of a process: a pty master, one duplex connection."""

from __future__ import annotations

import asyncio
import errno
import functools
import os
import termios
from collections.abc import Callable
from typing import Any

from gcsagent.agent.attachable import Attachable, Keeper, Load, drained, pipe_of
from gcsagent.agent.counters import queued
from gcsagent.agent.relay import MiddlePipe, Pump, PumpState
from gcsagent.agent.unattachable import NullStream, Unattachable
from protocol.errors import Code, RpcError
from protocol.types import StreamMode, StreamState

EOF = "eof"
"""What the name of an end of file begins with in the supervisor's store; offset and request follow."""

Holding = asyncio.Future[tuple[Any, list[int]]]


class TypedEnd:
    """An end-of-file character to be typed at ``offset``, for the request ``asked``.

    It waits in a pipe that the supervisor holds, and one system call takes it from there to the terminal: so
    it is typed once, whenever the agent is killed, and the empty pipe says that it has been.
    """

    __slots__ = ("_character", "asked", "fd", "held", "offset")

    def __init__(self, fd: int, offset: int, asked: str, character: bytes = b"") -> None:
        """``character`` is what is in the pipe; an earlier agent's is not known."""
        self.fd, self.offset, self.asked = fd, offset, asked
        self._character = character
        self.held = False

    @property
    def suffix(self) -> str:
        return f"{EOF}{self.offset}-{self.asked}"

    def type(self, terminal: int) -> None:
        """Raises BlockingIOError while the terminal takes nothing, OSError when it is hung up."""
        if queued(self.fd):
            self._fit(termios.tcgetattr(terminal)[6][termios.VEOF])
            os.splice(self.fd, terminal, 1, flags=os.SPLICE_F_NONBLOCK)

    def _fit(self, character: bytes) -> None:
        """A program may have changed what ends its input. The pipe is not empty in between."""
        if character != self._character:
            write_end = os.open(f"/proc/self/fd/{self.fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                os.write(write_end, character)
            finally:
                os.close(write_end)
            os.read(self.fd, queued(self.fd) - 1)
            self._character = character


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
        self._eof: TypedEnd | None = None

    def resize(self, rows: int, cols: int) -> None:
        """Raises FAILED_PRECONDITION when the terminal has ended."""
        if self._fd < 0:
            raise RpcError(Code.FAILED_PRECONDITION, "the terminal has ended")
        termios.tcsetwinsize(self._fd, (rows, cols))

    def type_end(self, offset: int | None, asked: str = "") -> Holding | None:
        """Types the terminal's end-of-file character once ``offset`` bytes of input have reached it.

        What is returned is to be waited for: then it will be so, whatever becomes of this agent. ``asked``
        for again, as by a client whose answer was lost with an agent, it is still typed once. Raises OSError.
        """
        if self.ended or (asked and self._eof is not None and self._eof.asked == asked):
            return None
        character = termios.tcgetattr(self._fd)[6][termios.VEOF]
        eof = TypedEnd(pipe_of(character), self._taken() if offset is None else offset, asked, character)
        self._drop_eof()
        self._eof = eof
        holding = self._keeper.supervisor.request(
            "hold", {"hold": {f"{self._name}.{eof.suffix}": 0}}, (eof.fd,)
        )
        holding.add_done_callback(functools.partial(self._on_eof_held, eof))
        return holding

    def _on_eof_held(self, eof: TypedEnd, holding: Holding) -> None:
        if eof is not self._eof:
            return
        if holding.cancelled() or holding.exception() is not None:
            self._drop_eof()
        else:
            eof.held = True
            self._check_eof(self._taken())

    def close_input(self, offset: int | None) -> None:
        self.type_end(offset)

    def closing_at(self) -> int | None:
        return None  # the supervisor knows

    def restore(self, held: dict[str, int]) -> None:
        for suffix in [each for each in held if each.startswith(EOF)]:
            offset, _, asked = suffix.removeprefix(EOF).partition("-")
            self._eof = TypedEnd(held.pop(suffix), int(offset), asked)
            self._eof.held = True
        if self._fd < 0:
            self._drop_eof()
        super().restore(held)
        self._check_eof(self._taken())

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
        output, _ = self._pumping()
        self._sink = null
        if not self.ended:
            output.attach(self._fd, null)

    def _pumping(self) -> tuple[Pump, Pump]:
        """The pumps, made with their middle pipes when there is something to move for the first time."""
        if self._output is None or self._input is None:
            for name, fd in self._to_hold().items():
                self._keeper.supervisor.hold(name, fd)
        assert self._output is not None
        assert self._input is not None
        return self._output, self._input

    def _start(self, connection: int) -> None:
        output, incoming = self._pumping()
        self._sink = connection
        output.attach(self._fd, connection)
        incoming.attach(connection, self._fd)

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
        out = MiddlePipe()
        try:
            into = MiddlePipe()
        except OSError:
            out.close()
            raise
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
        self._check_eof(self._taken())  # which may have waited for the pump to move

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
        eof = self._eof
        if eof is None or not eof.held or taken < eof.offset or self._fd < 0:
            return
        try:
            eof.type(self._fd)
        except BlockingIOError:
            if self._input is None or not self._input.waits_for_sink:  # else it comes here when it has moved
                self._loop.add_writer(self._fd, self._on_room)
        except OSError:
            return  # hung up: there is nobody to tell

    def _on_room(self) -> None:
        self._loop.remove_writer(self._fd)
        self._check_eof(self._taken())

    def _drop_eof(self) -> None:
        eof, self._eof = self._eof, None
        if eof is not None:
            os.close(eof.fd)
            self._keeper.supervisor.release(f"{self._name}.{eof.suffix}")

    def _drop_fd(self) -> None:
        self._drop_eof()
        if self._fd >= 0:
            self._loop.remove_writer(self._fd)
        super()._drop_fd()


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

    def type_end(self, _offset: int | None, asked: str = "") -> Holding | None:
        return self.tty.type_end(None, asked)

    def close_input(self, offset: int | None) -> None:
        self.type_end(offset)

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
