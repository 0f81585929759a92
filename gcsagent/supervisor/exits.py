"""Exit records: how each claimed process ended, in memory and on disk until the agent has taken it.

Written before anybody is told, so that the next agent finds it. A full disk is no reason to lose one: the
record stays in memory and the write is tried again.
"""

from __future__ import annotations

import json
import os
import time

from gcsagent.common.files import write_new
from gcsagent.common.loop import Loop
from gcsagent.supervisor.log import log

TYPE_CHECKING = False  # typing itself is half a megabyte
if TYPE_CHECKING:
    from typing import Any

RETRY_SECONDS = 5.0


class ExitRecords:
    def __init__(self, loop: Loop, directory: str) -> None:
        self._loop, self._directory = loop, directory
        self._unwritten: set[str] = set()
        self._retry_armed = False
        self.records: dict[str, dict[str, Any]] = {}
        os.makedirs(directory, mode=0o700, exist_ok=True)
        self._take_over()

    def _take_over(self) -> None:
        """Records that an earlier supervisor with the same state directory had no agent to give to."""
        for name in sorted(os.listdir(self._directory)):
            path = os.path.join(self._directory, name)
            try:
                with open(path, encoding="utf-8") as file:
                    record = json.load(file)
                key = record.pop("key")
                if not isinstance(key, str) or self._path(record) != path:
                    raise ValueError("not one of ours")
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                log("warning", "a broken exit record is removed", path=path, error=str(error))
                _unlink(path)
            else:
                self.records[key] = record

    def add(self, key: str, record: dict[str, Any]) -> None:
        self.records[key] = record
        self._unwritten.add(key)
        self._write_all()

    def forget(self, key: str) -> None:
        record = self.records.pop(key, None)
        if record is None:
            return
        self._unwritten.discard(key)
        _unlink(self._path(record))

    def _path(self, record: dict[str, Any]) -> str:
        """Named by when and who, not by the key: two ids of full length are no file name (NAME_MAX)."""
        return os.path.join(self._directory, f"{record['exited_at_ns']}.{record['pid']}.json")

    def _write_all(self) -> None:
        for key in list(self._unwritten):
            path = self._path(self.records[key])
            try:
                write_new(path + ".tmp", json.dumps({"key": key, **self.records[key]}).encode("ascii"))
                os.rename(path + ".tmp", path)
            except OSError as error:
                _unlink(path + ".tmp")
                log("warning", "an exit record cannot be written; kept in memory", key=key, error=str(error))
                self._arm_retry()
                return
            self._unwritten.discard(key)

    def _arm_retry(self) -> None:
        if not self._retry_armed:
            self._retry_armed = True
            self._loop.after(RETRY_SECONDS, self._retry)

    def _retry(self) -> None:
        self._retry_armed = False
        self._write_all()


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return


def describe(pid: int, status: int, usage: Any) -> dict[str, Any]:
    """What wait4(2) said, as the record that goes to disk and to the agent."""
    return {
        "pid": pid,
        "status": status,
        "exited_at_ns": time.time_ns(),
        "rusage": {
            "user_us": int(usage.ru_utime * 1_000_000),
            "system_us": int(usage.ru_stime * 1_000_000),
            "max_rss_kib": usage.ru_maxrss,
            "minor_faults": usage.ru_minflt,
            "major_faults": usage.ru_majflt,
            "block_in": usage.ru_inblock,
            "block_out": usage.ru_oublock,
            "voluntary_switches": usage.ru_nvcsw,
            "involuntary_switches": usage.ru_nivcsw,
        },
    }
