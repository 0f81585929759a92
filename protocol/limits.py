"""Every bound the contract puts on a peer, with the reason beside it."""

from __future__ import annotations

from dataclasses import dataclass

MAX_FRAME = 1 << 20
"""Bytes of one MessagePack-RPC message. An OCI spec with a full seccomp profile is about 60 KiB."""

MAX_DEPTH = 32
"""Nesting of one message. An OCI spec nests 8 deep; msgpack's own C stack would allow 1,024."""

MAX_VALUES = 1 << 18
"""Values in one message, at every depth. An empty map is one byte on the wire and 64 in Python: without
this a frame of MAX_FRAME empty maps takes 90 MiB to decode. Real messages take over four bytes a value."""

MAX_IN_FLIGHT = 256
"""Requests outstanding on one connection; one more is answered RESOURCE_EXHAUSTED."""

MAX_MSGID = (1 << 32) - 1
"""MessagePack-RPC: msgid is a 32-bit unsigned integer."""

MAX_ID = 128
"""Characters of a container, process or request id: it becomes a directory and a cgroup name."""

MAX_STREAM_OFFSET = (1 << 63) - 1
"""Stream offsets fit a signed 64-bit integer, as off_t does."""

MIN_SPOOL = 64 << 10
"""Smallest limit of a spool: what a pipe holds."""

DEFAULT_SPOOL = 16 << 20
"""Limit of a spool that names none."""

MAX_SPOOL = 1 << 40
"""Largest limit of a spool; what the guest has room for is less."""

MAX_CHUNK = 1 << 19
"""Bytes of an upload in one request: half a frame."""

MAX_UPLOAD = 32 << 20
"""Bytes of one upload; the agent's own code is a tenth of a megabyte."""

MAX_PAGE = 4096
"""Processes in one answer of container.processes; each is some 30 values and 300 bytes, and its command."""

MAX_COMMAND = 4096
"""Bytes of a command line in it; a longer one is cut off."""

MAX_DEADLINE_MS = 24 * 3600 * 1000
"""Longest deadline of a call that is not unbounded."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one side accepts from the other; the agent states its own in ``agent.hello``."""

    max_frame: int = MAX_FRAME
    """Bytes of one message."""
    max_depth: int = MAX_DEPTH
    """Levels of arrays and maps in one message, its own array included."""
    max_values: int = MAX_VALUES
    """Values in one message, keys included, at every depth."""
    max_in_flight: int = MAX_IN_FLIGHT
    """Requests outstanding on one connection."""
