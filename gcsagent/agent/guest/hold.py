"""The file that says a snapshot is being made: ``<state>/snapshot.json``.

It is written before anything is frozen and removed when all is thawed, so that an agent which finds one knows
what was under way and until when.
"""

from __future__ import annotations

import contextlib
import logging
import os

from gcsagent.agent.proc import boot_id
from gcsagent.agent.process_dir import VERSION, read_json, write_json
from gcsagent.agent.storage.table import boot_time_ns
from protocol.dataclass import dataclass

_log = logging.getLogger("agent.guest.snapshot")


@dataclass(frozen=True, slots=True)
class Hold:
    snapshot: str
    until_ns: int
    """By the clock that goes on while the guest is suspended; 0 until the guest is held."""
    mounts: tuple[int, ...]
    """Numbers of the mounts that are frozen for it."""
    seq: int = 0
    """The last event before it was held."""

    @property
    def left_ns(self) -> int:
        return max(0, self.until_ns - boot_time_ns())


class HoldFile:
    def __init__(self, state: str) -> None:
        self._path = os.path.join(state, "snapshot.json")

    def write(self, hold: Hold) -> None:
        """Raises OSError."""
        document = {
            "version": VERSION,
            "boot_id": boot_id(),
            "snapshot": hold.snapshot,
            "until_ns": hold.until_ns,
            "mounts": list(hold.mounts),
            "seq": hold.seq,
        }
        write_json(self._path, document)

    def read(self) -> Hold | None:
        """What an earlier agent of this boot left. A broken one is told of, and goes with the next."""
        try:
            document = read_json(self._path)
            if document["boot_id"] != boot_id():
                self.remove()
                return None
            mounts = tuple(int(number) for number in document["mounts"])
            until, seq = int(document["until_ns"]), int(document["seq"])
            return Hold(str(document["snapshot"]), until, mounts, seq)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            # The mounts have files of their own, and thaw by those.
            _log.error("the file of a snapshot cannot be read", extra={"error": str(error)})
            return None

    def remove(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
