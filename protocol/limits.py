"""Every bound the contract puts on a peer, with the reason beside it."""

from __future__ import annotations

from protocol.dataclass import dataclass

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

MAX_LABELS = 256 << 10
"""Bytes of a container's labels together, in UTF-8: whoever lists containers gets them all."""

MIN_SPOOL = 64 << 10
"""Smallest limit of a spool: what a pipe holds."""

DEFAULT_SPOOL = 16 << 20
"""Limit of a spool that names none."""

MAX_SPOOL = 1 << 40
"""Largest limit of a spool; what the guest has room for is less."""

MAX_CHUNK = 1 << 19
"""Bytes of an archive in one notification: half a frame."""

MAX_UPLOAD = 32 << 20
"""Bytes of an archive of code; the agent's own is a tenth of a megabyte."""

MAX_PAGE = 4096
"""Processes in one answer of container.processes; each is some 30 values and 300 bytes, and its command."""

MAX_COMMAND = 4096
"""Bytes of a command line in it; a longer one is cut off."""

MAX_METRICS_PAGE = 256
"""Containers in one answer of agent.metrics; a page that grows long before has fewer."""

MAX_LOG_PAGE = 1000
"""Entries in one answer of agent.logs; long ones fill a page earlier."""

MAX_MOUNTS = 512
"""Mounts made by storage.mount that there may be at once."""

MAX_LAYERS = 128
"""Lower directories of one overlay; the kernel takes 500, if their names fit a page."""

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
    max_in_flight_total: int = 4096
    """Requests outstanding on all connections together; the first 8 of a connection are always taken."""
    max_connections: int = 4096
    """Connections that have been welcomed and are no stream."""
    max_unfinished: int = 64 << 20
    """Bytes of messages that have arrived in part, on all connections together."""
    max_stall_ms: int = 30_000
    """How long a client may take to say hello, to finish a message, or to take anything of its answers."""
    max_containers: int = 1024
    """Containers, in any status."""
    max_execs: int = 4096
    """Exec'd processes of one container, ended ones that have not been deleted included."""
    max_execs_total: int = 8192
    """Likewise, of all containers together."""
    max_runtime_calls: int = 6
    """Calls of the runtime under way for one connection: further ones wait. What is not set follows the
    guest's CPUs: two for each and two more; this is the default of two CPUs."""
    max_runtime_calls_total: int = 12
    """Likewise, for all connections together; unless set, twice the above."""
    max_spool_bytes: int = 64 << 30
    """Sum of the limits of all spools that block."""
    max_log_bytes: int = 64 << 30
    """Sum of the limits of all spools that drop their oldest bytes."""
    max_event_bytes: int = 1 << 20
    """Size of the ring that events are replayed from: at least the newer half of it is there at any time."""
    max_forwards: int = 1024
    """Forwarded connections, those being made included."""
    max_upload_bytes: int = MAX_UPLOAD
    """Bytes of an archive of code for `agent.upgrade`."""
