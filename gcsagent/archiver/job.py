"""What the agent tells an archiver, as one argument of its command line."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from protocol.dataclass import dataclass, names_of

if TYPE_CHECKING:  # the agent has no use for tarfile
    from gcsagent.tarball.attributes import IdMap

CONNECTION_FD, ROOT_FD, NOTE_FD = 0, 3, 4
"""Descriptors an archiver is given: the host's connection, the root directory, where it writes down the
temporary name it is using."""


@dataclass(frozen=True, slots=True)
class Job:
    method: str
    msgid: int
    params: dict[str, Any]
    """As they came, and have been checked."""
    seconds: float | None = None
    """Until the deadline."""
    mountinfo: str = "/proc/self/mountinfo"
    """Of the mount namespace that the root directory is in."""
    uids: IdMap = ()
    gids: IdMap = ()

    def to_text(self) -> str:
        return json.dumps({name: getattr(self, name) for name in names_of(Job)})

    @classmethod
    def from_text(cls, text: str) -> Job:
        wire = json.loads(text)
        for name in ("uids", "gids"):
            wire[name] = tuple((inner, out, count) for inner, out, count in wire[name])
        return cls(**wire)
