"""The streams of one process: what is attached to them, how far they have come, when they end.

A stream outlives the connections attached to it. Its guest end (a pipe's end, or the pty master), its
middle pipe and the connection now attached are all held by the supervisor under names derived from the
stream's, because closing any of them is an event that somebody sees: the last copy must be closed when
the stream says so, and not when an agent dies.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import termios
from collections.abc import Callable
from typing import Protocol

from gcsagent.agent.counters import CounterSlots, queued
from gcsagent.agent.relay import MiddlePipe, Pump, PumpState
from gcsagent.agent.supervisor_client import SupervisorClient
from protocol.errors import Code, RpcError
from protocol.types import StreamMode, StreamState

REPLY_SIZE = 65_536
"""Bytes of a reply at the most: what a pipe holds."""

LINGER_SECONDS = 30.0
"""How long an output connection stays open after the stream's end for its peer to close first: a guest's
close can overtake data that still sits in the VMM (hybrid vsock)."""


class Keeper:
    """Where streams keep descriptors and counts: the supervisor's store and the counter slots."""

    def __init__(self, supervisor: SupervisorClient, counters: CounterSlots) -> None:
        self.supervisor = supervisor
        self.counters = counters


class Stream(Protocol):
    """What the method table sees of a stream."""

    def attach(self, connection: socket.socket, take: bool, reply: bytes) -> None: ...
    def check_attachable(self, take: bool) -> int: ...
    def close_input(self, offset: int | None) -> None: ...
    def closing_at(self) -> int | None: ...
    def state(self) -> StreamState: ...
    def produced(self) -> int: ...
    def process_ended(self) -> None: ...
    def close(self) -> None: ...


class NullStream:
    """/dev/null: nothing to attach to."""

    def check_attachable(self, take: bool) -> int:
        raise RpcError(Code.FAILED_PRECONDITION, "this stream is null; ask for mode 'stream' when creating")

    def attach(self, connection: socket.socket, take: bool, reply: bytes) -> None:
        self.check_attachable(take)

    def close_input(self, offset: int | None) -> None:
        return  # it reads end of file already

    def closing_at(self) -> int | None:
        return None

    def state(self) -> StreamState:
        return StreamState(mode=StreamMode.NULL, ended=True)

    def produced(self) -> int:
        return 0

    def process_ended(self) -> None:
        return

    def close(self) -> None:
        return


class _Attachable:
    """What all real streams share: one connection at a time, and the pumps that serve it."""

    def __init__(self, keeper: Keeper, name: str, fd: int, ended: Callable[[int], None]) -> None:
        """``name`` is the stream's in the supervisor's store, where ``fd`` is held already; ``ended`` gets
        the number of bytes, once, when no more will come. ``fd`` is -1 when that was before."""
        self._keeper, self._name, self._fd, self._tell_end = keeper, name, fd, ended
        self._loop = asyncio.get_running_loop()
        self._connection: socket.socket | None = None
        self._linger: asyncio.TimerHandle | None = None
        self._reply = -1
        self.ended = fd < 0
        if fd >= 0:
            os.set_blocking(fd, False)

    # -- the connection -------------------------------------------------------------------------

    @property
    def attached(self) -> bool:
        return self._connection is not None

    def check_attachable(self, take: bool) -> int:
        """The offset an attach now would report. Raises FAILED_PRECONDITION when somebody is attached."""
        if self.attached and not take:
            raise RpcError(
                Code.FAILED_PRECONDITION, "somebody is attached to this stream; ask with take to replace them"
            )
        return self._offset()

    def attach(self, connection: socket.socket, take: bool, reply: bytes) -> None:
        """Sends ``reply``, the answer to the request to attach, and from then on the stream's own bytes.

        The reply goes through a pipe that the supervisor holds together with the connection: an agent
        that takes over finds in it what has not been sent. Without that, a client might be answered twice,
        or never, when the agent is killed right here.
        """
        self.check_attachable(take)
        self.detach()
        read_end, write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        os.write(write_end, reply)
        os.close(write_end)
        names = {f"{self._name}.conn": 0, f"{self._name}.reply": 1}
        self._keeper.supervisor.tell("hold", {"hold": names}, (connection.fileno(), read_end))
        self._connection = connection
        self._send_reply(read_end)

    def _send_reply(self, reply: int) -> None:
        """Moves what is left of the reply to the connection, then begins with the stream."""
        assert self._connection is not None
        try:
            while queued(reply):
                os.splice(reply, self._connection.fileno(), REPLY_SIZE, flags=os.SPLICE_F_NONBLOCK)
        except BlockingIOError:
            self._reply = reply
            self._loop.add_writer(self._connection, self._resume_reply)
            return
        except OSError:
            self._drop_reply(reply)
            self.detach()
            return
        self._drop_reply(reply)
        self._serve(self._connection)

    def _resume_reply(self) -> None:
        if self._connection is not None and self._reply >= 0:
            self._loop.remove_writer(self._connection)
            reply, self._reply = self._reply, -1
            self._send_reply(reply)

    def _drop_reply(self, reply: int) -> None:
        os.close(reply)
        self._keeper.supervisor.release(f"{self._name}.reply")

    def restore(self, held: dict[str, int]) -> None:
        """Goes on where an earlier agent was killed, with what it held under names below this stream's.

        ``held`` maps those suffixes (``conn``, ``out.r``, ...) to descriptors, now this stream's.
        """
        self._restore_middles(held)
        connection, reply = held.pop("conn", None), held.pop("reply", None)
        if connection is None:
            return
        self._connection = socket.socket(fileno=connection)
        self._connection.setblocking(False)
        if reply is not None:
            self._send_reply(reply)
        else:
            self._serve(self._connection)

    def _serve(self, connection: socket.socket) -> None:
        if self.ended:
            self._start_linger()
            self._watch_peer()
        else:
            self._start(connection.fileno())

    def detach(self) -> None:
        """Lets the connection go, whoever wants it; the stream itself stays as it is. Idempotent."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None
        self._stop()
        self._loop.remove_reader(connection)
        if self._reply >= 0:
            self._loop.remove_writer(connection)
            self._drop_reply(self._reply)
            self._reply = -1
        connection.close()
        self._keeper.supervisor.release(f"{self._name}.conn")

    def _start_linger(self) -> None:
        if self.attached and self._linger is None:
            self._linger = self._loop.call_later(LINGER_SECONDS, self.detach)

    def _watch_peer(self) -> None:
        """Notices that the peer of an output connection is gone, which splicing into it may never tell."""
        if self._connection is not None:
            self._loop.add_reader(self._connection, self._on_peer)

    def _on_peer(self) -> None:
        """Drops what the peer sends where nothing may be sent (or nobody reads any more); sees it leave."""
        assert self._connection is not None
        try:
            gone = not self._connection.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            gone = True
        if gone:
            self.detach()

    def _end(self, count: int) -> None:
        if not self.ended:
            self.ended = True
            self._tell_end(count)

    # -- the middle pipe ------------------------------------------------------------------------

    def _held_middle(self, held: dict[str, int], suffix: str) -> MiddlePipe | None:
        """An earlier agent's. One that had only one end held had not been used: it is given up."""
        read_end, write_end = held.pop(f"{suffix}.r", -1), held.pop(f"{suffix}.w", -1)
        if read_end >= 0 and write_end >= 0:
            return MiddlePipe((read_end, write_end))
        for fd in (read_end, write_end):
            if fd >= 0:
                os.close(fd)
        self._keeper.supervisor.release(f"{self._name}.{suffix}.r", f"{self._name}.{suffix}.w")
        return None

    def _hold_middle(self, suffix: str) -> MiddlePipe:
        middle = MiddlePipe()
        supervisor = self._keeper.supervisor
        supervisor.hold(f"{self._name}.{suffix}.r", middle.read_end)
        supervisor.hold(f"{self._name}.{suffix}.w", middle.write_end)
        return middle

    def _drop_middle(self, middle: MiddlePipe, suffix: str) -> None:
        middle.close()
        self._keeper.supervisor.release(f"{self._name}.{suffix}.r", f"{self._name}.{suffix}.w")

    def _drop_fd(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._keeper.supervisor.release(self._name)

    # -- for the kinds --------------------------------------------------------------------------

    def _restore_middles(self, held: dict[str, int]) -> None:
        raise NotImplementedError

    def _offset(self) -> int:
        raise NotImplementedError

    def _start(self, connection: int) -> None:
        raise NotImplementedError

    def _stop(self) -> None:
        raise NotImplementedError


class OutputStream(_Attachable):
    """stdout or stderr: the read end of a pipe whose write end the process has."""

    def __init__(self, keeper: Keeper, name: str, fd: int, slot: int, ended: Callable[[int], None]) -> None:
        super().__init__(keeper, name, fd, ended)
        self._slot = slot
        self._pump: Pump | None = None
        self._middle: MiddlePipe | None = None

    def close_input(self, offset: int | None) -> None:
        raise RpcError(Code.INVALID_ARGUMENT, "this stream is an output")

    def closing_at(self) -> int | None:
        return None

    def state(self) -> StreamState:
        return StreamState(StreamMode.STREAM, self._offset(), self.attached, self.ended)

    def produced(self) -> int:
        """Bytes the process has written so far: those delivered and those still in pipes."""
        waiting = queued(self._fd) if self._fd >= 0 else 0
        return self._offset() + (self._pump.in_middle if self._pump else 0) + waiting

    def process_ended(self) -> None:
        return  # what it wrote stays in the pipe for whoever attaches

    def close(self) -> None:
        self.detach()
        self._drop_fd()
        if self._middle is not None:
            self._drop_middle(self._middle, "out")
            self._middle = None
        self._keeper.counters.free(self._slot)

    def _offset(self) -> int:
        return self._pump.delivered if self._pump else self._keeper.counters.delivered(self._slot, 0)

    def _restore_middles(self, held: dict[str, int]) -> None:
        self._middle = self._held_middle(held, "out")
        if self._middle is not None:
            self._pump = self._make_pump(self._middle)

    def _make_pump(self, middle: MiddlePipe) -> Pump:
        return Pump(
            self._keeper.counters,
            self._slot,
            middle,
            on_source_end=self._on_source_end,
            on_sink_broken=lambda _code: self.detach(),
        )

    def _start(self, connection: int) -> None:
        if self._pump is None:
            self._middle = self._hold_middle("out")
            self._pump = self._make_pump(self._middle)
        self._pump.attach(self._fd, connection)
        self._watch_peer()

    def _stop(self) -> None:
        if self._pump is not None:
            self._pump.detach()

    def _on_source_end(self, _code: int) -> None:
        self._drop_fd()
        self._end(self._offset())
        self._start_linger()


class InputStream(_Attachable):
    """stdin: the write end of a pipe whose read end the process has."""

    def __init__(
        self, keeper: Keeper, name: str, fd: int, slot: int, ended: Callable[[int], None], once: bool
    ) -> None:
        super().__init__(keeper, name, fd, ended)
        self._slot, self._once = slot, once
        self._pump: Pump | None = None
        self._middle: MiddlePipe | None = None
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

    def state(self) -> StreamState:
        return StreamState(StreamMode.STREAM, self._offset(), self.attached, self.ended)

    def produced(self) -> int:
        return self._offset()

    def process_ended(self) -> None:
        """Nobody reads any more (or a child still does, which is none of the client's business)."""
        self._finish()

    def close(self) -> None:
        self._finish()
        if self._middle is not None:
            self._drop_middle(self._middle, "in")
            self._middle = None
        self._keeper.counters.free(self._slot)

    def detach(self) -> None:
        was_attached = self.attached
        super().detach()
        if was_attached and self._once and not self.ended:
            self._finish()

    def _offset(self) -> int:
        return self._pump.delivered if self._pump else self._keeper.counters.delivered(self._slot, 0)

    def _restore_middles(self, held: dict[str, int]) -> None:
        self._middle = self._held_middle(held, "in")
        if self._middle is not None:
            self._pump = self._make_pump(self._middle)

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
        if self._pump is None:
            self._middle = self._hold_middle("in")
            self._pump = self._make_pump(self._middle)
        self._pump.attach(connection, self._fd)

    def _stop(self) -> None:
        if self._pump is not None:
            self._pump.detach()

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


class TtyStream(_Attachable):
    """A pty master: one connection, both directions."""

    def __init__(
        self, keeper: Keeper, name: str, fd: int, slots: tuple[int, int], ended: Callable[[int], None]
    ) -> None:
        super().__init__(keeper, name, fd, ended)
        self._slots = slots
        self._output: Pump | None = None
        self._input: Pump | None = None
        self._middles: list[tuple[MiddlePipe, str]] = []
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

    def process_ended(self) -> None:
        return  # the kernel hangs the terminal up when its session leader ends; EIO tells

    def close(self) -> None:
        self.detach()
        self._stop()
        self._drop_fd()
        for middle, suffix in self._middles:
            self._drop_middle(middle, suffix)
        self._middles.clear()
        for slot in self._slots:
            self._keeper.counters.free(slot)

    def _offset(self) -> int:
        return self._output.delivered if self._output else self._keeper.counters.delivered(self._slots[0], 0)

    def _taken(self) -> int:
        return self._input.delivered if self._input else self._keeper.counters.delivered(self._slots[1], 0)

    def discard_into(self, null: int) -> None:
        """Moves all output to ``null``, an open /dev/null, from now on."""
        if self._output is None or self._input is None:
            self._output, self._input = self._make_pumps()
        if not self.ended:
            self._output.attach(self._fd, null)

    def _start(self, connection: int) -> None:
        if self._output is None or self._input is None:
            self._output, self._input = self._make_pumps()
        self._output.attach(self._fd, connection)
        self._input.attach(connection, self._fd)

    def _restore_middles(self, held: dict[str, int]) -> None:
        out, into = self._held_middle(held, "out"), self._held_middle(held, "in")
        if out is not None or into is not None:
            # With one of them missing nothing had been moved either way: both are held before any byte is.
            self._output, self._input = self._make_pumps(out, into)

    def _make_pumps(self, out: MiddlePipe | None = None, into: MiddlePipe | None = None) -> tuple[Pump, Pump]:
        out = self._hold_middle("out") if out is None else out
        into = self._hold_middle("in") if into is None else into
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
        for pump in (self._output, self._input):
            if pump is not None:
                pump.detach()

    def _on_hangup(self, _code: int) -> None:
        """The last slave was closed and everything written to it has been delivered."""
        if self._input is not None:
            self._input.detach()
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


class DiscardedTty:
    """A terminal in mode null: what the process writes to it is dropped, as /dev/null would."""

    def __init__(self, tty: TtyStream) -> None:
        self._tty = tty
        self._null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        tty.discard_into(self._null)

    def check_attachable(self, take: bool) -> int:
        return NullStream().check_attachable(take)

    def attach(self, connection: socket.socket, take: bool, reply: bytes) -> None:
        self.check_attachable(take)

    def resize(self, rows: int, cols: int) -> None:
        self._tty.resize(rows, cols)

    def close_input(self, offset: int | None) -> None:
        self._tty.close_input(None)

    def closing_at(self) -> int | None:
        return self._tty.closing_at()

    def state(self) -> StreamState:
        return StreamState(StreamMode.NULL, self._tty.state().bytes, False, self._tty.ended)

    def produced(self) -> int:
        return self._tty.produced()

    def process_ended(self) -> None:
        self._tty.process_ended()

    def close(self) -> None:
        self._tty.close()
        if self._null >= 0:
            os.close(self._null)
            self._null = -1
