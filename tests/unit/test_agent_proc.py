"""The kernel's small text files, as they are read in one place for all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gcsagent.agent import proc

NUMBERS = "S 10 11 12 0 -1 4194304 1 2 3 4 5 6 7 8 20 0 9 0 12345 1000 2"


def test_a_name_cannot_pass_for_the_fields_behind_it() -> None:
    found = proc.parse_stat(f"77 (a) S 1 (b) {NUMBERS}\n".encode())
    assert (found.name, found.state, found.ppid, found.session) == ("a) S 1 (b", "S", 10, 12)
    assert (found.flags, found.cpu_ticks, found.threads, found.started_ticks) == (4194304, 11, 9, 12345)


@pytest.mark.parametrize("state, threads, ended", [("Z", 1, True), ("Z", 2, False), ("S", 1, False)])
def test_a_zombie_whose_threads_go_on_has_not_ended(state: str, threads: int, ended: bool) -> None:
    numbers = NUMBERS.replace("S", state, 1).replace(" 9 0 12345", f" {threads} 0 12345")
    assert proc.parse_stat(f"77 (x) {numbers}\n".encode()).ended is ended


def test_this_process_is_read_and_one_that_is_gone_is_not() -> None:
    assert proc.stat(os.getpid()).ppid == os.getppid()
    assert proc.status(os.getpid())["Pid"] == str(os.getpid())
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    for read in (proc.stat, proc.status):
        with pytest.raises(FileNotFoundError):
            read(gone.pid)


def test_memory_is_a_number_for_every_line_that_has_one(tmp_path: Path) -> None:
    file = tmp_path / "meminfo"
    file.write_text("MemTotal:       1000 kB\nHugePages_Total:       2\nNothing:\n")
    assert proc.meminfo(str(file)) == {"MemTotal": 1000, "HugePages_Total": 2}
    assert proc.meminfo(str(tmp_path / "none")) == {}
    assert proc.meminfo()["MemTotal"] > 0


def test_this_boot_has_a_name_and_an_age() -> None:
    assert len(proc.boot_id()) == 36
    assert proc.uptime() > 0
