"""What a method of the contract is, and what every request may carry."""

from __future__ import annotations

from protocol import checks
from protocol.dataclass import dataclass


@dataclass(frozen=True, slots=True)
class Envelope:
    """What every request may carry beside its own arguments."""

    deadline_ms: checks.DeadlineMs | None = None
    """How long the request may take from its arrival; absent, the method's default."""
    request_id: checks.RequestId | None = None
    """Names a mutating request, so that sending it again does not do it again."""


@dataclass(frozen=True, slots=True)
class Empty:
    """No arguments, or nothing to say."""


@dataclass(frozen=True, slots=True)
class Method:
    """One request of the contract.

    ``deadline_ms`` is what applies when the caller names none; None means unbounded. ``mutating`` methods
    may carry a ``request_id``, and ``commit`` says from when on success wins over cancel and deadline.
    One that ``streams`` turns its connection into a raw byte stream behind its successful response.
    """

    name: str
    params: type
    result: type
    deadline_ms: int | None
    mutating: bool = False
    commit: str = ""
    streams: bool = False


QUICK, RUNTIME, LONG = 10_000, 60_000, 120_000
"""Default deadlines in milliseconds: looked up, done by the runtime, done by it more than once."""
