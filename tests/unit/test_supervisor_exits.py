"""Exit records: on disk before anybody is told, in memory whatever the disk says, gone when forgotten."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest

from gcsagent.common.loop import Loop
from gcsagent.supervisor import exits
from gcsagent.supervisor.exits import ExitRecords


def record(pid: int, status: int = 0) -> dict[str, Any]:
    return exits.describe(pid, status, resource.getrusage(resource.RUSAGE_SELF))


def on_disk(directory: Path) -> dict[str, dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in directory.iterdir()]
    return {document.pop("key"): document for document in found}


def test_a_record_is_on_disk_under_its_key_until_forgotten(tmp_path: Path) -> None:
    records = ExitRecords(Loop(), str(tmp_path / "exits"))
    first, second = record(10, 256), record(11, 9)
    records.add("c/init", first)
    records.add("c/exec", second)
    assert on_disk(tmp_path / "exits") == {"c/init": first, "c/exec": second} == records.records
    records.forget("c/init")
    records.forget("c/init")
    records.forget("unknown")
    assert on_disk(tmp_path / "exits") == {"c/exec": second} == records.records


def test_the_longest_ids_have_a_record_on_disk_too(tmp_path: Path) -> None:
    records = ExitRecords(Loop(), str(tmp_path))
    key = f"{'c' * 128}/{'p' * 128}"
    records.add(key, record(10))
    assert list(on_disk(tmp_path)) == [key]


def test_a_full_disk_loses_no_record_it_is_kept_and_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exits, "RETRY_SECONDS", 0.01)
    loop = Loop()
    records = ExitRecords(loop, str(tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # every write fails, as on a full disk
    try:
        records.add("c/one", record(10))
        records.add("c/two", record(11))
        loop.after(0.05, loop.stop)
        loop.run()
        assert set(records.records) == {"c/one", "c/two"}
        assert os.listdir(tmp_path) == []
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    loop._running = True
    loop.after(0.05, loop.stop)
    loop.run()
    assert on_disk(tmp_path) == records.records


def test_a_record_forgotten_before_it_could_be_written_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exits, "RETRY_SECONDS", 0.01)
    directory = tmp_path / "exits"
    loop = Loop()
    records = ExitRecords(loop, str(directory))
    directory.rmdir()
    records.add("c/one", record(10))
    records.forget("c/one")
    directory.mkdir()
    loop.after(0.05, loop.stop)
    loop.run()
    assert os.listdir(directory) == []
    assert records.records == {}


def test_a_record_says_what_wait4_said() -> None:
    pid = os.posix_spawnp("sh", ["sh", "-c", "exit 7"], {"PATH": os.environ["PATH"]})
    _, status, usage = os.wait4(pid, 0)
    described = exits.describe(pid, status, usage)
    assert (described["pid"], os.waitstatus_to_exitcode(described["status"])) == (pid, 7)
    assert described["rusage"]["max_rss_kib"] > 0
    assert set(described["rusage"]) == {
        "user_us",
        "system_us",
        "max_rss_kib",
        "minor_faults",
        "major_faults",
        "block_in",
        "block_out",
        "voluntary_switches",
        "involuntary_switches",
    }


def test_what_an_earlier_supervisor_left_is_taken_over_and_rubbish_removed(tmp_path: Path) -> None:
    record = {"pid": 7, "status": 256, "exited_at_ns": 5, "rusage": {}}
    ExitRecords(Loop(), str(tmp_path)).add("c/init", record)
    for name, text in (("x.json", "{"), ("y.json", "[]"), ("6.8.json.tmp", ""), ("9.9.json", '{"key": 3}')):
        (tmp_path / name).write_text(text)
    successor = ExitRecords(Loop(), str(tmp_path))
    assert successor.records == {"c/init": record}
    assert os.listdir(tmp_path) == ["5.7.json"]
    successor.forget("c/init")
    assert os.listdir(tmp_path) == []
