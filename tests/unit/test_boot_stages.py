"""The guest's account of its boot: told once, kept for agent.info, and readable whatever is in the file."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from gcsagent.agent.machine_facts import machine, msgpack_version
from gcsagent.common import boot


@pytest.fixture
def stages_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(boot, "_told", set())
    return tmp_path / boot.STAGES_FILE


def test_a_stage_is_told_and_kept_once(stages_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stages_file.write_text("kernel 2.51\ninit 2.60\n")
    before = time.clock_gettime(time.CLOCK_BOOTTIME)
    boot.reached("agent", str(stages_file.parent))
    boot.reached("agent", str(stages_file.parent))
    assert [name for name, _ in boot.stages(str(stages_file.parent))] == ["kernel", "init", "agent"]
    uptime = boot.stages(str(stages_file.parent))[-1][1]
    assert before - 0.001 <= uptime <= time.clock_gettime(time.CLOCK_BOOTTIME) + 0.001
    assert capfd.readouterr().err == f"gcs-boot: agent {uptime:.3f}\n"


@pytest.mark.parametrize(
    "text", ["", "init\n", "init soon\n", "init 1 2\n", "init nan\n", "init -1\n", "init 1.2.3\n", "\n"]
)
def test_a_line_that_is_none_is_passed_over(stages_file: Path, text: str) -> None:
    stages_file.write_text(f"kernel 2.51\n{text}ready 5\n")
    assert boot.stages(str(stages_file.parent)) == [("kernel", 2.51), ("ready", 5.0)]


def test_without_a_place_to_keep_it_a_stage_is_still_told(
    stages_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    nowhere = str(stages_file / "not a directory")
    boot.reached("agent", nowhere)
    boot.reached("agent", nowhere)
    assert capfd.readouterr().err.count("gcs-boot: agent ") == 1
    assert boot.stages(nowhere) == []


def test_the_machine_is_what_its_files_say(tmp_path: Path) -> None:
    for name, text in {
        "proc/cpuinfo": "processor\t: 0\nmodel name\t: QEMU TCG CPU version 2.5+\nmodel name\t: other\n",
        "proc/cmdline": "console=ttyS0  panic=-1\n",
        "sys/class/dmi/id/sys_vendor": "QEMU\n",
        "sys/class/dmi/id/product_name": "Standard PC (Q35 + ICH9, 2009)\n",
        "sys/devices/system/clocksource/clocksource0/current_clocksource": "tsc\n",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found = machine(True, str(tmp_path))
    assert found.processor == "QEMU TCG CPU version 2.5+"
    assert found.product == "QEMU Standard PC (Q35 + ICH9, 2009)"
    assert (found.clocksource, found.command_line) == ("tsc", "console=ttyS0 panic=-1")
    assert found.architecture
    assert machine(False, str(tmp_path)).command_line == ""


def test_a_machine_that_tells_nothing_has_empty_facts(tmp_path: Path) -> None:
    found = machine(True, str(tmp_path))
    assert (found.processor, found.product, found.clocksource, found.command_line) == ("", "", "", "")


def test_msgpack_says_what_it_is_written_in() -> None:
    assert msgpack_version().endswith((" (C)", " (Python)"))
