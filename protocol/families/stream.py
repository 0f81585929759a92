"""``stream.*``: the bytes of a process."""

from __future__ import annotations

from enum import StrEnum

from protocol import checks
from protocol.dataclass import dataclass
from protocol.method import QUICK, RUNTIME, Empty, Method


class StreamName(StrEnum):
    """Names a stream can be attached by."""

    STDIN = "stdin"
    STDOUT = "stdout"
    STDERR = "stderr"
    TTY = "tty"


@dataclass(frozen=True, slots=True)
class Attach:
    """``offset`` is for streams that can replay; ``take`` detaches whoever is attached now."""

    container: checks.Id
    process: checks.Id = checks.INIT
    stream: StreamName = StreamName.STDOUT
    """Which one; ``tty`` for a process with a terminal."""
    offset: checks.Offset | None = None
    """Where to begin. A spool: at any offset it keeps, or its end; absent, at the oldest byte it keeps.
    Others begin where they are: an offset that is another one is ``FAILED_PRECONDITION``."""
    take: bool = False
    """Detach whoever is attached now, instead of being refused."""
    passive: bool = False
    """For a spool with ``tee``: read along as from a log, and hold nothing up."""
    exec_request: checks.RequestId | None = None
    """Only if it is the process of the exec with this ``request_id``, which may still be on its way: the
    answer comes when the process runs."""


@dataclass(frozen=True, slots=True)
class Attached:
    """``offset``: bytes of this stream moved before this connection; for a TTY the guest's output."""

    offset: int
    """Bytes of this stream moved before this connection; for a TTY, of its output; for a spool, where the
    bytes that follow begin."""


@dataclass(frozen=True, slots=True)
class Ack:
    """The client has what comes before ``offset`` and will never ask for it again."""

    container: checks.Id
    process: checks.Id = checks.INIT
    stream: StreamName = StreamName.STDOUT
    """A spool."""
    offset: checks.Offset = 0
    """Bytes before this one may be released."""


@dataclass(frozen=True, slots=True)
class Find:
    """Where in a spool to begin reading: at the later of what ``since_ns`` and ``tail`` say."""

    container: checks.Id
    process: checks.Id = checks.INIT
    stream: StreamName = StreamName.STDOUT
    """A spool."""
    since_ns: checks.Offset | None = None
    """The first bytes written at or after this time, since the epoch, by the guest's clock."""
    tail: checks.Offset | None = None
    """This many lines before the end; what follows the last newline is a line."""


@dataclass(frozen=True, slots=True)
class Found:
    offset: int
    """Where to attach."""
    first: int
    """Oldest byte kept."""
    end: int
    """Bytes taken into the spool so far."""


METHODS = (
    Method("stream.attach", Attach, Attached, QUICK, streams=True),
    Method("stream.ack", Ack, Empty, QUICK, True, "the bytes have been released"),
    Method("stream.find", Find, Found, RUNTIME),
)
