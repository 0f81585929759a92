"""A stream that is kept: filled from the process all the time, read by whoever attaches, at any offset.

Filling and reading do not know each other. What the process writes goes into the spool as it comes (as long
as there is room, in ``block``), and every connection has a reader with a position of its own. Pipe, spool,
index, positions and connections are held by the supervisor; an agent that starts goes on with all of them.

With ``tee`` a log has one reader that filling does know: what that one has not been sent is not dropped, and
no more is taken from the process than the limit holds beside it. When it is gone, the log is a log again.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable

from gcsagent.agent.attachable import Attachment, Keeper, Load
from gcsagent.agent.counters import queued
from gcsagent.agent.relay import enlarge
from gcsagent.agent.spool import GRANULE, Spool
from gcsagent.agent.spool_index import SpoolIndex
from gcsagent.agent.spool_reader import CHUNK, ROUNDS, SpoolReader, position_of
from gcsagent.agent.stopwatch import Stopwatch
from protocol.errors import Code, RpcError
from protocol.limits import DEFAULT_SPOOL
from protocol.types import StreamMode, StreamSpec, StreamState, WhenFull

MAX_READERS = 16
"""Connections attached to one log."""

RETRY_SECONDS = 1.0
"""A full disk does not say when it has room again."""

_READER, _LEADER = "r", "l"
"""What a reader's name in the supervisor's store begins with; the leader is the one a tee waits for."""

_log = logging.getLogger("agent.spool")


class SpoolStream:
    """stdout or stderr in mode ``spool``. ``fd`` is the read end of the process's pipe, -1 past its end."""

    def __init__(
        self,
        keeper: Keeper,
        name: str,
        fd: int,
        spool: Spool,
        index: SpoolIndex,
        spec: StreamSpec,
        slot: int,
        ended: Callable[[int], None],
    ) -> None:
        self.spool, self.index = spool, index
        self._keeper, self._name, self._fd, self._slot = keeper, name, fd, slot
        self._tees = bool(spec.tee)
        when_full = WhenFull.DROP_OLDEST if spec.tee else WhenFull.BLOCK
        self._limit, self._when_full = spec.limit or DEFAULT_SPOOL, spec.when_full or when_full
        self._tell_end = ended
        self._loop = asyncio.get_running_loop()
        self._readers: list[SpoolReader] = []
        self._leader: SpoolReader | None = None
        self._last_reader = 0
        self._retry: asyncio.TimerHandle | None = None
        self._filling = self._closed = self._enlarged = False
        self._full = Stopwatch()
        self.ended = self._told = fd < 0
        if fd >= 0:
            os.set_blocking(fd, False)
        self._resume()

    @property
    def _drops(self) -> bool:
        return self._when_full is WhenFull.DROP_OLDEST

    # -- what the method table sees ---------------------------------------------------------------

    def state(self) -> StreamState:
        return StreamState(
            StreamMode.SPOOL,
            self.spool.written,
            bool(self._leader if self._tees else self._readers),
            self.ended,
            self.spool.first,
            self._when_full,
        )

    def check_attachable(self, take: bool, offset: int | None = None, passive: bool = False) -> int:
        """Where an attach would begin. Raises FAILED_PRECONDITION, RESOURCE_EXHAUSTED."""
        somebody = self._leader if self._tees else self._readers and not self._drops
        if somebody and not passive and not take:
            raise RpcError(
                Code.FAILED_PRECONDITION, "somebody is attached to this stream; ask with take to replace them"
            )
        if len(self._readers) >= MAX_READERS:
            raise RpcError(Code.RESOURCE_EXHAUSTED, f"{MAX_READERS} clients read this log already")
        first, end = self.spool.first, self.spool.written
        if offset is None:
            return first
        if not first <= offset <= end:
            raise RpcError(
                Code.FAILED_PRECONDITION,
                f"this spool holds bytes {first} to {end}; {offset} is not among them",
                first=first,
                end=end,
                dropped=max(0, first - offset),
            )
        return offset

    def attach(self, client: Attachment) -> None:
        """Sends the reply and then the bytes from the client's offset on."""
        if not self._drops:
            self._detach_all()
        leads = self._tees and not client.passive
        if leads and self._leader is not None:
            self._leader.detach()
        self._last_reader += 1
        reader = self._reader(self._last_reader, self.spool.reader(client.offset), leads)
        try:
            reader.attach(client)
        except OSError:
            reader.give_up()
            raise

    def close_input(self, offset: int | None) -> None:
        raise RpcError(Code.INVALID_ARGUMENT, "this stream is an output")

    def closing_at(self) -> int | None:
        return None

    def produced(self) -> int:
        return self.spool.written + (queued(self._fd) if self._fd >= 0 else 0)

    def load(self) -> Load:
        """Blocked is while it is full."""
        return Load(queued(self._fd) if self._fd >= 0 else 0, self._full.seconds)

    def fill_now(self) -> None:
        """Takes what is in the pipe without waiting to be woken, as far as there is room."""
        if self._fd >= 0 and self._room() > 0:
            self._fill()

    def move_rest(self, file: int) -> int:
        """Moves what a full spool has left in the pipe to ``file``; returns how much. Raises OSError."""
        moved = 0
        while self._fd >= 0 and (waiting := queued(self._fd)):
            moved += os.splice(self._fd, file, waiting, flags=os.SPLICE_F_NONBLOCK)
        return moved

    def process_ended(self) -> None:
        return  # what it wrote last is taken as ever

    def settled(self) -> bool:
        return self.ended and self._led and (self._drops or self.spool.kept == 0)

    def idle_since(self) -> float | None:
        return None  # a log is taken as it comes, however long somebody goes on to write it

    def acknowledge(self, offset: int) -> None:
        """Releases what comes before ``offset``. Raises FAILED_PRECONDITION beyond what there is."""
        if offset > self.spool.written:
            raise RpcError(
                Code.FAILED_PRECONDITION,
                f"only {self.spool.written} bytes have been written to this stream, not {offset}",
                end=self.spool.written,
            )
        self._release(offset)
        self._resume()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._detach_all()
        self._drop_source()
        os.close(self.spool.fd)
        self.index.close()
        self._keeper.supervisor.release(f"{self._name}.file", f"{self._name}.index")
        self._keeper.counters.free(self._slot)

    # -- filling --------------------------------------------------------------------------------

    def _resume(self) -> None:
        """Watches the pipe, if there is one and there is room."""
        if self._fd < 0 or self._filling or self._retry is not None:
            return
        if self._room() > 0:
            self._filling = True
            self._full.stop()
            self._loop.add_reader(self._fd, self._fill)
        else:
            self._full.start()

    def _pause(self) -> None:
        if self._filling:
            self._filling = False
            self._loop.remove_reader(self._fd)

    def _room(self) -> int:
        if self._leader is not None:
            return min(CHUNK, self._leader.position + self._limit - self.spool.written)
        return CHUNK if self._drops else min(CHUNK, self._limit - self.spool.kept)

    @property
    def _led(self) -> bool:
        """Nobody who is to have every byte is behind."""
        return self._leader is None or self._leader.position >= self.spool.written

    def progressed(self, reader: SpoolReader) -> None:
        """It has been sent more."""
        if reader is self._leader:
            self._resume()
            self._tell_when_led()

    def _tell_when_led(self) -> None:
        if self.ended and self._led and not self._told:
            self._told = True
            self._tell_end(self.spool.written)

    def _fill(self) -> None:
        self.index.note(self.spool.written, time.time_ns(), self.spool.first)
        for _ in range(ROUNDS):
            room = self._room()
            if room <= 0:
                self._pause()
                self._full.start()
                break
            try:
                moved = self.spool.take(self._fd, room)
            except BlockingIOError:
                break
            except OSError as error:
                self._cannot_store(error)
                break
            if moved == 0:
                self._source_ended()
                break
            if moved == GRANULE and not self._enlarged:
                self._enlarged = True
                enlarge(self._fd)  # so that the process writes on while we store
            if self._drops:
                self._release(self.spool.written - self._limit)
        for reader in list(self._readers):
            reader.wake()

    def _cannot_store(self, error: OSError) -> None:
        """The bytes stay in the pipe. A log gives up its older half for them; else the process waits."""
        _log.warning("a spool cannot grow", extra={"stream": self._name, "error": str(error)})
        if self._drops:
            half = self.spool.first + (self.spool.kept + 1) // 2
            self._release(half if self._leader is None else min(half, self._leader.position))
        self._pause()
        self._retry = self._loop.call_later(RETRY_SECONDS, self._try_again)

    def _try_again(self) -> None:
        self._retry = None
        self._resume()

    def _release(self, offset: int) -> None:
        """Readers that have not come so far leave first: they must not be sent what is a hole now."""
        if offset <= self.spool.first:
            return
        self.spool.release(offset)
        for reader in list(self._readers):
            if reader.position < offset:
                reader.detach()
        self.spool.punch()

    def _source_ended(self) -> None:
        self._drop_source()
        self.ended = True
        self._tell_when_led()

    def _drop_source(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        self._pause()
        self._full.stop()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._keeper.supervisor.release(self._name)

    # -- readers --------------------------------------------------------------------------------

    def _reader(self, number: int, fd: int, leads: bool) -> SpoolReader:
        name = f"{self._name}.{_LEADER if leads else _READER}{number}"
        reader = SpoolReader(self._keeper, name, fd, self.spool, self)
        self._readers.append(reader)
        if leads:
            self._leader = reader
        return reader

    def forget(self, reader: SpoolReader) -> None:
        """It has detached."""
        if reader in self._readers:
            self._readers.remove(reader)
        if reader is self._leader:
            self._leader = None
            if not self._closed:
                self._resume()
                self._tell_when_led()

    def _detach_all(self) -> None:
        for reader in list(self._readers):
            reader.detach()

    def restore(self, held: dict[str, int]) -> None:
        """Takes up readers of an earlier agent; ``held`` maps ``r1``, ``r1.conn``, ``l2``, ... ."""
        found: dict[str, dict[str, int]] = {}
        for suffix, fd in held.items():
            reader, _, part = suffix.partition(".")
            found.setdefault(reader, {})[part] = fd
        for reader, parts in sorted(found.items(), key=lambda item: int(item[0][1:])):
            self._last_reader = int(reader[1:])
            position = parts.get("", -1)
            if "conn" in parts and position >= 0 and self.spool.first <= position_of(position):
                self._reader(self._last_reader, parts.pop(""), reader[0] == _LEADER).restore(parts)
            else:  # killed before it was attached, while it was let go, or when it had fallen behind
                self._give_up(reader, parts)

    def _give_up(self, reader: str, parts: dict[str, int]) -> None:
        for part, fd in parts.items():
            os.close(fd)
            name = f"{self._name}.{reader}"
            self._keeper.supervisor.release(f"{name}.{part}" if part else name)
