"""Makes the streams of a process that is about to start, and the descriptors it starts with."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable

from gcsagent.agent.attachable import Keeper, Stream
from gcsagent.agent.calls import TAIL
from gcsagent.agent.fifo import FifoStream, open_ends
from gcsagent.agent.runtime import Launch
from gcsagent.agent.spool import Spool, make_file
from gcsagent.agent.spool_index import SpoolIndex
from gcsagent.agent.spool_stream import SpoolStream
from gcsagent.agent.streams import InputStream, OutputStream
from gcsagent.agent.supervisor_client import SupervisorError
from gcsagent.agent.terminal import DiscardedTty, TtyStream
from gcsagent.agent.unattachable import NullStream
from protocol.dataclass import dataclass, field
from protocol.errors import Code, RpcError
from protocol.types import Stdio, StreamMode, StreamSpec, WhenFull

_NUMBERS = {"stdin": 0, "stdout": 1, "stderr": 2}

PIPE = 65_536
"""What a pipe holds (pipe(7))."""

Ended = Callable[[str, int], None]
"""Gets a stream's name and its total of bytes when no more will come."""


@dataclass(slots=True)
class PreparedStdio:
    """``child`` are the process's own ends, ours to close once they are sent; ``hold`` the guest's ends.

    Beyond its three standard descriptors the process gets those that ``child`` has behind them.
    """

    key: str
    stdio: Stdio
    streams: dict[str, Stream] = field(default_factory=dict)
    child: list[int | None] = field(default_factory=lambda: [None, None, None])
    hold: dict[str, int] = field(default_factory=dict)
    slots: dict[str, list[int]] = field(default_factory=dict)

    def launch(self, pid_file: str) -> Launch:
        return Launch(
            process=self.key,
            pid_file=pid_file,
            fds=tuple(self.child),
            hold=self.hold,
            console_name=stream_name(self.key, "tty") if self.stdio.terminal else "",
        )

    def add_fifo(self, name: str, path_fd: int) -> None:
        """Opens the fifo behind ``path_fd``, of O_PATH, as ``name``: stdin to stderr, or fd3 and so on.

        Raises OSError.
        """
        ends = open_ends(path_fd, name)
        number = _NUMBERS[name] if name in _NUMBERS else int(name.removeprefix("fd"))
        self.child += [None] * (number + 1 - len(self.child))
        self.child[number] = ends.child
        stream = self.streams.get(name)
        if isinstance(stream, FifoStream):
            stream.opened(ends.hold)
            self.hold[stream_name(self.key, name)] = ends.hold

    def said(self) -> str:
        """The end of what is on standard error so far: of a launch that failed, the runtime's own words."""
        if self.stdio.stderr.mode not in (StreamMode.STREAM, StreamMode.SPOOL):
            return ""
        name, data = stream_name(self.key, "stderr"), b""
        with contextlib.suppress(OSError):  # it has said nothing, or nothing more
            if (file := self.hold.get(f"{name}.file")) is not None:
                data = os.pread(file, TAIL, max(0, os.fstat(file).st_size - TAIL))
            if (pipe := self.hold.get(name)) is not None:
                data += os.read(pipe, PIPE)
        return data[-TAIL:].decode(errors="replace").strip()

    def close_child(self) -> None:
        for fd in self.child:
            if fd is not None:
                os.close(fd)
        self.child = [None, None, None]


def stream_name(key: str, stream: str) -> str:
    """A stream's name in the supervisor's store; ``key`` is the process's."""
    return f"fd/{key}/{stream}"


def check(stdio: Stdio) -> None:
    """Raises INVALID_ARGUMENT or UNIMPLEMENTED naming the field."""
    problem = stdio.problem()
    if problem is not None:
        raise RpcError(Code.INVALID_ARGUMENT, f"stdio: {problem}", field="stdio")
    for name in ("stdin", "stdout", "stderr", "tty"):
        spec = getattr(stdio, name)
        if spec.mode is StreamMode.SPOOL and name in ("stdin", "tty"):
            raise RpcError(
                Code.UNIMPLEMENTED,
                f"stdio.{name}: only stdout and stderr can be in mode 'spool'; use 'stream'",
                field=f"stdio.{name}.mode",
            )
        if spec.mode is StreamMode.FIFO and name == "tty":
            raise RpcError(
                Code.UNIMPLEMENTED,
                "stdio.tty: a terminal cannot be a fifo; use 'stream' and copy it to one where it is read",
                field="stdio.tty.mode",
            )
        if spec.tee and (spec.mode is not StreamMode.SPOOL or spec.when_full is WhenFull.BLOCK):
            raise RpcError(
                Code.INVALID_ARGUMENT,
                f"stdio.{name}: tee is for a spool that drops its oldest bytes: a log",
                field=f"stdio.{name}.tee",
            )
        if (spec.mode is StreamMode.FIFO) != (spec.path is not None):
            raise RpcError(
                Code.INVALID_ARGUMENT,
                f"stdio.{name}: mode 'fifo' needs a path, and no other mode takes one",
                field=f"stdio.{name}.path",
            )


def prepare(keeper: Keeper, key: str, stdio: Stdio, directory: str, ended: Ended) -> PreparedStdio:
    """Pipes for the streams that want one, spools in ``directory``'s file system for those that are kept.

    Raises RESOURCE_EXHAUSTED, with nothing left open.
    """
    prepared = PreparedStdio(key, stdio)
    if stdio.terminal:
        return prepared
    try:
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            spec = getattr(stdio, name)
            if spec.mode is StreamMode.NULL:
                prepared.streams[name] = NullStream()
            elif spec.mode is StreamMode.FIFO:  # opened by add_fifo, when there is a place to note it in
                prepared.streams[name] = _fifo(keeper, key, name, spec)
            else:
                _add_pipe(prepared, keeper, number, name, directory, ended)
    except (OSError, OverflowError) as error:
        prepared.close_child()
        close_all(prepared.streams)
        raise RpcError(Code.RESOURCE_EXHAUSTED, f"no pipe for {key}: {error}") from error
    return prepared


def _fifo(keeper: Keeper, key: str, name: str, spec: StreamSpec, fd: int = -1) -> FifoStream:
    return FifoStream(keeper, stream_name(key, name), spec.path or "", is_input=name == "stdin", fd=fd)


def _add_pipe(
    prepared: PreparedStdio, keeper: Keeper, number: int, name: str, directory: str, ended: Ended
) -> None:
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    full_name = stream_name(prepared.key, name)
    try:
        slot = keeper.counters.allocate()
    except OverflowError:
        os.close(read_end)
        os.close(write_end)
        raise
    prepared.slots[name] = [slot]
    if number == 0:
        ours, prepared.child[number] = write_end, read_end
        prepared.streams[name] = InputStream(
            keeper, full_name, ours, slot, lambda count: ended(name, count), prepared.stdio.stdin_once
        )
    else:
        ours, prepared.child[number] = read_end, write_end
        spec, tell = getattr(prepared.stdio, name), functools.partial(ended, name)
        if spec.mode is StreamMode.SPOOL:
            spool, index = _make_spool(prepared, keeper, full_name, ours, directory, slot)
            prepared.streams[name] = SpoolStream(keeper, full_name, ours, spool, index, spec, slot, tell)
        else:
            prepared.streams[name] = OutputStream(keeper, full_name, ours, slot, tell)
    prepared.hold[full_name] = ours


def _make_spool(
    prepared: PreparedStdio, keeper: Keeper, full_name: str, source: int, directory: str, slot: int
) -> tuple[Spool, SpoolIndex]:
    """Raises OSError, with ``source`` closed."""
    file = -1
    try:
        file = make_file(directory)
        index = SpoolIndex()
    except OSError:
        for fd in (source, file):
            if fd >= 0:
                os.close(fd)
        keeper.counters.free(slot)
        raise
    prepared.hold |= {f"{full_name}.file": file, f"{full_name}.index": index.fd}
    return Spool(file, keeper.counters, slot), index


async def take_terminal(prepared: PreparedStdio, keeper: Keeper, ended: Ended) -> None:
    """Makes the stream of the pty master that the supervisor received from the runtime."""
    name = stream_name(prepared.key, "tty")
    try:
        fds = await keeper.supervisor.fetch([name])
    except SupervisorError as error:
        raise RpcError(Code.INTERNAL, "the runtime sent no terminal for the process") from error
    if not os.isatty(fds[0]):
        os.close(fds[0])
        raise RpcError(Code.INTERNAL, "what the runtime sent for the process is no terminal")
    # A terminal that goes on from a checkpoint has its counters already.
    slots = prepared.slots.get("tty") or _terminal_slots(keeper, fds[0])
    prepared.slots["tty"] = slots
    stream = TtyStream(keeper, name, fds[0], (slots[0], slots[1]), lambda count: ended("tty", count))
    stream.resize(prepared.stdio.winsize.rows, prepared.stdio.winsize.cols)
    if prepared.stdio.tty.mode is StreamMode.NULL:
        prepared.streams["tty"] = DiscardedTty(stream)
    else:
        prepared.streams["tty"] = stream


def _terminal_slots(keeper: Keeper, fd: int) -> list[int]:
    """Raises RESOURCE_EXHAUSTED, with ``fd`` closed."""
    slots: list[int] = []
    try:
        for _ in range(2):
            slots.append(keeper.counters.allocate())
    except OverflowError as error:
        os.close(fd)
        for slot in slots:
            keeper.counters.free(slot)
        raise RpcError(Code.RESOURCE_EXHAUSTED, f"no room to count a terminal's bytes: {error}") from error
    return slots


def restore(
    keeper: Keeper,
    key: str,
    stdio: Stdio,
    slots: dict[str, list[int]],
    held: dict[str, dict[str, int]],
    ended: Ended,
) -> dict[str, Stream]:
    """The streams of a process an earlier agent started.

    ``held`` maps stream names to what is held for them: ``""`` the guest's end, ``conn``, ``out.r``, ...
    """
    streams: dict[str, Stream] = {}
    for name in ("tty",) if stdio.terminal else ("stdin", "stdout", "stderr"):
        full_name, fds = stream_name(key, name), held.get(name, {})
        if getattr(stdio, name).mode is StreamMode.NULL and not stdio.terminal:
            streams[name] = NullStream()
            continue
        if getattr(stdio, name).mode is StreamMode.FIFO:
            streams[name] = _fifo(keeper, key, name, getattr(stdio, name), fds.pop("", -1))
            continue
        tell = functools.partial(ended, name)
        fd, own = fds.pop("", -1), slots[name]
        real: InputStream | OutputStream | SpoolStream | TtyStream
        if name == "tty":
            real = TtyStream(keeper, full_name, fd, (own[0], own[1]), tell)
        elif name == "stdin":
            real = InputStream(keeper, full_name, fd, own[0], tell, stdio.stdin_once)
        elif getattr(stdio, name).mode is StreamMode.SPOOL:
            spool = Spool(fds.pop("file"), keeper.counters, own[0])
            index = SpoolIndex(fds.pop("index"))
            real = SpoolStream(keeper, full_name, fd, spool, index, getattr(stdio, name), own[0], tell)
        else:
            real = OutputStream(keeper, full_name, fd, own[0], tell)
        real.restore(fds)
        discard = isinstance(real, TtyStream) and stdio.tty.mode is StreamMode.NULL
        streams[name] = DiscardedTty(real) if discard and isinstance(real, TtyStream) else real
    return streams


def close_all(streams: dict[str, Stream]) -> None:
    for stream in streams.values():
        stream.close()
