"""One forward: a host's connection and the target's, and a pump each way between them.

    client -> target   ends with ``forward.close_write``, which becomes shutdown(SHUT_WR) on the target's side
    target -> client   ends with the target's end of file, which ``forward.wait`` tells with the count

Neither end is ever told by the host's connection: hybrid vsock has no half-close, and a close by the guest
may overtake bytes. When both ways have ended, the host is given time to close first. A connection that the
host closes before that is lost: the target's is reset, so that nobody takes what is missing for the end.

Everything lasting is in the supervisor's store, put there in one packet before the first byte is moved:
the name says the rest (:class:`Identity`), so there is no file that could be older or younger than it. What
only waits, ``forward.close_write`` and ``forward.wait``, its client asks again when the agent has died.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import struct
from collections.abc import Callable
from typing import Any, TypeVar

from gcsagent.agent.attachable import Attachable, Keeper
from gcsagent.agent.forwarding.hangups import Hangups
from gcsagent.agent.relay import MiddlePipe, Pump
from protocol.dataclass import dataclass
from protocol.errors import Code, RpcError
from protocol.families.forward import ForwardEnd

T = TypeVar("T")

PREFIX = "forward/"
HELD = frozenset({"", "conn", "out.r", "out.w", "in.r", "in.w"})
"""What is held of each, by what follows its name; ``reply`` until that has been sent."""

_RESET = struct.pack("ii", 1, 0)
"""struct linger, socket(7): closing sends a reset."""


@dataclass(frozen=True, slots=True)
class Identity:
    """``slots``: counters of target -> client, client -> target, and the end."""

    ident: str
    container: str
    slots: tuple[int, int, int]

    @property
    def name(self) -> str:
        return f"{PREFIX}{self.container}/{self.ident}:{':'.join(map(str, self.slots))}"

    @classmethod
    def parse(cls, name: str) -> Identity:
        """Raises ValueError."""
        container, _, rest = name.removeprefix(PREFIX).partition("/")
        ident, out, into, end = rest.split(":")
        return cls(ident, container, (int(out), int(into), int(end)))


class Forward(Attachable):
    """``gone`` is called once, when nothing is left of it."""

    def __init__(
        self,
        keeper: Keeper,
        identity: Identity,
        fd: int,
        hangups: Hangups,
        gone: Callable[[Forward], None],
    ) -> None:
        """``fd``: the target's connection, this forward's from here on."""
        super().__init__(keeper, identity.name, fd, lambda _count: None)
        self.identity = identity
        self._hangups, self._gone = hangups, gone
        self._output: Pump | None = None
        self._input: Pump | None = None
        self._middles: list[tuple[MiddlePipe, str]] = []
        self._watched = -1
        self._close_at: int | None = None
        self._input_over = self._over = False
        self._fault = 0  # what broke the target's connection while it was written to
        self._result: ForwardEnd | None = None
        self._enders: list[asyncio.Future[ForwardEnd]] = []
        self._closers: list[asyncio.Future[None]] = []

    # -- what the host asks ---------------------------------------------------------------------

    async def wait(self) -> ForwardEnd:
        """Until the target has ended what it sends. Raises UNAVAILABLE when the connection is lost first."""
        if self._result is not None:
            return self._result
        return await self._wait_in(self._enders)

    async def close_write(self, offset: int) -> None:
        """Ends what the target receives behind ``offset`` bytes, and returns when that is done, or the target
        takes no more. Raises FAILED_PRECONDITION for another offset than before, UNAVAILABLE."""
        if self._close_at not in (None, offset):
            raise RpcError(
                Code.FAILED_PRECONDITION,
                f"the end of what the target receives is at {self._close_at} already",
                offset=self._close_at,
            )
        self._close_at = offset
        if self._input is not None:
            self._check_close(self._input.delivered)
        if not self._input_over:
            await self._wait_in(self._closers)

    async def _wait_in(self, waiters: list[asyncio.Future[T]]) -> T:
        future: asyncio.Future[T] = self._loop.create_future()
        waiters.append(future)
        try:
            return await future
        finally:
            waiters.remove(future)

    def abort(self) -> None:
        """Ends it for a reason of the guest's: both sides see their connection break."""
        if self.attached:
            self.detach()
        else:
            self._finish()

    # -- the connections ------------------------------------------------------------------------

    def detach(self) -> None:
        """The host's connection is gone, and with it the forward."""
        was_attached = self.attached
        if self._watched >= 0:
            self._hangups.forget(self._watched)
            self._watched = -1
        super().detach()
        if was_attached:
            self._finish()

    def _finish(self) -> None:
        if self._over:
            return
        self._over = True
        self._stop()
        if not (self._input_over and self._result is not None) and self._fd >= 0:
            _reset(self._fd)
        self._drop_fd()
        for middle, suffix in self._middles:
            self._drop_middle(middle, suffix)
        self._middles.clear()
        self._output = self._input = None
        self._free(*self.identity.slots)
        lost = RpcError(Code.UNAVAILABLE, f"forward {self.identity.ident} has lost its connection")
        waiters: list[asyncio.Future[Any]] = [*self._enders, *self._closers]
        for waiter in waiters:
            if not waiter.done():
                waiter.set_exception(lost)
        self._gone(self)

    # -- the kinds' part of Attachable ----------------------------------------------------------

    def _to_hold(self) -> dict[str, int]:
        out = MiddlePipe()
        try:
            into = MiddlePipe()
        except OSError:
            out.close()
            raise
        self._make_pumps(out, into)
        return {self._name: self._fd, **self._names_of(out, "out"), **self._names_of(into, "in")}

    def _hold_nothing(self) -> None:
        self._finish()

    def _restore_middles(self, held: dict[str, int]) -> None:
        out, into = (MiddlePipe((held.pop(f"{way}.r"), held.pop(f"{way}.w"))) for way in ("out", "in"))
        self._make_pumps(out, into)

    def _make_pumps(self, out: MiddlePipe, into: MiddlePipe) -> None:
        self._middles = [(out, "out"), (into, "in")]
        out_slot, in_slot, _ = self.identity.slots
        self._output = Pump(
            self._keeper.counters,
            out_slot,
            out,
            on_source_end=self._on_target_end,
            on_sink_broken=lambda _code: self.detach(),
        )
        self._input = Pump(
            self._keeper.counters,
            in_slot,
            into,
            on_source_end=lambda _code: self.detach(),
            on_sink_broken=self._on_target_broken,
            on_progress=self._check_close,
        )

    def _offset(self) -> int:
        return self._output.delivered if self._output is not None else 0

    def _start(self, connection: int) -> None:
        if self._output is None or self._input is None or self._fd < 0:
            self.detach()
            return
        self._watched = connection
        self._hangups.watch(connection, self.detach)
        self._input.attach(connection, self._fd)
        known = self._keeper.counters.delivered(self.identity.slots[2], 0)
        if known:  # an earlier agent saw the end, and all before it is through
            self._ended_with(known - 1)
        else:
            self._output.attach(self._fd, connection)

    def _stop(self) -> None:
        for pump in (self._output, self._input):
            if pump is not None:
                pump.detach()

    # -- the ends -------------------------------------------------------------------------------

    def _on_target_end(self, code: int) -> None:
        self._ended_with(code or self._fault)

    def _ended_with(self, code: int) -> None:
        """Written down before it is told: an error is reported by the kernel once, and then no more."""
        self._keeper.counters.filling(self.identity.slots[2], code + 1)
        self._result = ForwardEnd(self._offset(), code)
        for waiter in self._enders:
            if not waiter.done():
                waiter.set_result(self._result)
        if code and not self._input_over:
            self._end_input()
        else:
            self._check_over()

    def _on_target_broken(self, code: int) -> None:
        """It takes no more. What it has sent may still be on its way out; what else comes is dropped."""
        self._fault = 0 if code == errno.EPIPE else code
        self._end_input()

    def _check_close(self, delivered: int) -> None:
        if self._close_at is None or delivered < self._close_at or self._input_over:
            return
        with contextlib.suppress(OSError), socket.socket(fileno=self._fd) as target:
            try:
                target.shutdown(socket.SHUT_WR)
            finally:
                target.detach()
        self._end_input()

    def _end_input(self) -> None:
        self._input_over = True
        if self._input is not None:
            self._input.detach()
        for waiter in self._closers:
            if not waiter.done():
                waiter.set_result(None)
        self._watch_peer()
        self._check_over()

    def _check_over(self) -> None:
        if self._result is not None and self._input_over:
            self._start_linger()


def _reset(fd: int) -> None:
    with contextlib.suppress(OSError):
        sock = socket.socket(fileno=fd)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        finally:
            sock.detach()
