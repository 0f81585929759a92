"""Exit records: how each claimed process ended, in memory and on disk until the agent has taken it.

Written before anybody is told, so that the next agent finds it. A full disk is no reason to lose one: the
record stays in memory and the write is tried again.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

from gcsagent.supervisor.log import log
from gcsagent.supervisor.loop import Loop

RETRY_SECONDS = 5.0


class ExitRecords:
    def __init__(self, loop: Loop, directory: str) -> None:
        self._loop, self._directory = loop, directory
        self._unwritten: set[str] = set()
        self._retry_armed = False
        self.records: dict[str, dict[str, Any]] = {}
        os.makedirs(directory, mode=0o700, exist_ok=True)

    def add(self, key: str, record: dict[str, Any]) -> None:
        self.records[key] = record
        self._unwritten.add(key)
        self._write_all()

    def forget(self, key: str) -> None:
        if self.records.pop(key, None) is None:
            return
        self._unwritten.discard(key)
        try:
            os.unlink(self._path(key))
        except FileNotFoundError:
            return

    def _path(self, key: str) -> str:
        return os.path.join(self._directory, key.replace("/", "@") + ".json")

    def _write_all(self) -> None:
        for key in list(self._unwritten):
            path = self._path(key)
            try:
                with open(path + ".tmp", "w", encoding="utf-8") as file:
                    json.dump({"key": key, **self.records[key]}, file)
                os.rename(path + ".tmp", path)
            except OSError as error:
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
