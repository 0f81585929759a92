"""Why a guest did not come up, in one line that says what to do, from what its console shows.

What is recognised, first match first: init's or the supervisor's own account (FAILED), with the agent's last
words where the agent is at fault; memory that does not suffice; an initramfs that is damaged, or has no
program to begin with; a PID 1 that ended, with its last words; any other panic, in the kernel's words.
"""

from __future__ import annotations

import json
import re
import signal
from dataclasses import dataclass
from pathlib import Path

from gcsagent.host.vm.console import ConsoleMonitor, without_time

_MAX_WORDS = 300
_MAX_EVIDENCE = 20

# As the kernel words it: mm/oom_kill.c, init/initramfs.c (whose root is a tmpfs of half the memory),
# arch/x86/kernel/setup.c, mm/page_alloc.c.
_MEMORY = re.compile(
    r"Out of memory|System is deadlocked on memory|Initramfs unpacking failed: write error"
    r"|initrd extends beyond end of memory|page allocation failure"
)
_DAMAGED = re.compile(r"Initramfs unpacking failed: |Unpacking initramfs failed")
_NO_ROOT = re.compile(r"Kernel panic - not syncing: VFS: Unable to mount root fs")
_CANNOT_EXECUTE = re.compile(r"Failed to execute /init \(error -(\d+)\)")
_PID1_ENDED = re.compile(r"Kernel panic - not syncing: Attempted to kill init! exitcode=0x([0-9a-f]{8})")

_EXECUTE_ERRORS = {
    2: "it, or the interpreter it names, is not there",
    8: "it is no program",
    13: "it may not be executed",
}

_REBUILD = "build the image anew (scripts/build-rootfs.sh)"


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What of the VM's description bears on why it fails."""

    memory_mib: int
    initramfs: Path


def explain(console: ConsoleMonitor, reason: str, vm: Circumstances) -> str:
    """Why the boot failed, on one line; ``reason`` is how it was noticed."""
    if console.failure is not None:
        words = _last_words(console) if console.failure.stage == "agent" else ""
        reported = f"stage '{console.failure.stage}' failed: {console.failure.reason}"
        return f"{reported}: {words}" if words else reported
    if found := _first(console, _MEMORY):
        said = without_time(found.string)
        return f"{vm.memory_mib} MiB of memory do not suffice, give the VM more (--memory): {said}"
    if found := _first(console, _DAMAGED):
        return f"{vm.initramfs} is damaged, {_REBUILD}: {without_time(found.string)}"
    if found := _first(console, _CANNOT_EXECUTE):
        why = _EXECUTE_ERRORS.get(int(found[1]), f"error {found[1]}")
        return f"the kernel cannot execute /init of {vm.initramfs} ({why}): {_REBUILD}"
    if _first(console, _NO_ROOT):
        return f"{vm.initramfs} holds no /init: {_REBUILD}"
    if found := _first(console, _PID1_ENDED):
        words = _last_words(console)
        return f"PID 1 {_ended(int(found[1], 16))}" + (f": {words}" if words else "")
    return _unexplained(console, reason)


def evidence(console: ConsoleMonitor) -> tuple[str, ...]:
    """The console lines that show it: the last traceback, else those around the first trouble."""
    frames = _last_traceback(console.lines())
    return tuple(frames[-_MAX_EVIDENCE:]) if frames else console.relevant_lines(_MAX_EVIDENCE)


def _unexplained(console: ConsoleMonitor, reason: str) -> str:
    if console.panic is not None:
        return reason
    lines = console.lines()
    return f"{reason}; last console line: {lines[-1]}" if lines else reason


def _first(console: ConsoleMonitor, pattern: re.Pattern[str]) -> re.Match[str] | None:
    return next((found for line in console.lines() if (found := pattern.search(line))), None)


def _ended(code: int) -> str:
    """A wait status as the panic shows it (wait(2))."""
    if code & 0x7F:
        return f"was killed by {_signal_name(code & 0x7F)}"
    return f"ended with status {code >> 8 & 0xFF}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _last_words(console: ConsoleMonitor) -> str:
    """What a Python program said of its end: a traceback's last line and place, or a critical log line."""
    lines = console.lines()
    logged = next((words for line in reversed(lines) if (words := _critical(line))), "")
    frames = _last_traceback(lines)
    return (_summary(frames) if frames else logged)[:_MAX_WORDS]


def _last_traceback(lines: list[str]) -> list[str]:
    """From "Traceback" to the exception, without what others wrote in between."""
    starts = [
        index for index, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")
    ]
    if not starts:
        return []
    frames = [lines[starts[-1]]]
    for line in lines[starts[-1] + 1 :]:
        if line.startswith(" "):
            frames.append(line)
        elif line and not line.startswith(("{", "[", "gcs-boot: ")):
            return [*frames, line]
    return []  # cut off: what it came to is not there


def _summary(frames: list[str]) -> str:
    places = [found for line in frames if (found := re.match(r'\s+File "([^"]+)", line (\d+)', line))]
    where = f" ({Path(places[-1][1]).name}, line {places[-1][2]})" if places else ""
    return f"{frames[-1].strip()}{where}"


def _critical(line: str) -> str:
    """What a JSON log line of level critical says, with the end of its traceback."""
    if not line.startswith("{") or "CRITICAL" not in line:
        return ""
    try:
        entry = json.loads(line)
    except ValueError:
        return ""
    message, trace = str(entry.get("message", "")), str(entry.get("exc_info", "")).strip().splitlines()
    return f"{message}: {trace[-1]}" if trace else message
