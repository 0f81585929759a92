"""Makes sense of a guest's serial console: boot stages, kernel trouble, and text that is safe to show.

Every byte comes from the guest and is hostile: lines are cut at a maximum length, control and formatting
characters are escaped before anything is kept, and what is kept is bounded. No I/O here: bytes in, facts out.

The guest's init reports its progress as lines of its own,

    gcs-boot: STAGE UPTIME              (seconds since the kernel started)
    gcs-boot: FAILED STAGE: REASON

with the stages of `STAGES` in that order.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

STAGES = (
    "kernel",
    "init",
    "mounts",
    "modules",
    "disks",
    "network",
    "supervisor",
    "agent",
    "loaded",
    "ready",
)

_MAX_LINE_BYTES = 2048
_KEPT_LINES = 4000
_KEPT_FINDINGS = 200

_OOM_REPORT_LINES = 20
"""From the OOM killer's first line to its call trace, with what other CPUs say in between."""

# Not anchored: a kernel message may share the line with what user space writes.
_STAGE = re.compile(r"gcs-boot: ([a-z][a-z0-9-]{0,31}) (\d{1,9}(?:\.\d{1,9})?)\s*$")
_FAILED = re.compile(r"gcs-boot: FAILED ([a-z][a-z0-9-]{0,31}): (.{1,400})")

# The kernel's own wording; first match names the finding. User-space faults ("traps: python3[12] general
# protection fault ip:...", "segfault at") and cgroup OOM kills are a container's business and not listed.
_TROUBLE = tuple(
    (kind, re.compile(pattern))
    for kind, pattern in (
        ("panic", r"Kernel panic - not syncing"),
        ("lockup", r"(?:soft|hard) (?:lockup|LOCKUP)|Watchdog detected hard LOCKUP"),
        ("bug", r"\bBUG: |kernel BUG at "),
        ("oops", r"\bOops\b ?[:!\-]|\[#\d+\] (?:PREEMPT|SMP)|general protection fault, "),
        ("stall", r"(?:rcu|RCU)\S* (?:self-)?detected (?:expedited )?stalls?"),
        ("hung-task", r"blocked for more than \d+ seconds"),
        ("warning", r"WARNING: (?:CPU:|possible |suspicious |inconsistent )"),
        ("sanitizer", r"\b(?:UBSAN|KFENCE|KCSAN): "),
        ("memory", r"System is deadlocked on memory|Out of memory and no killable"),
        (
            "initramfs",
            r"(?:Initramfs unpacking failed|Unpacking initramfs failed|junk (?:at the end|within))",
        ),
        ("init", r"Failed to execute /init|No working init found|Requested init .* failed"),
        # Error 12 (ENOMEM) is that of a read that found no memory: the disk is well.
        ("disk", r"I/O error, dev |Buffer I/O error|(?:EXT4-fs|erofs|SQUASHFS)[ :].*\berror\b(?! -12\b)"),
        ("trace", r"Call Trace:"),
    )
)

_ANY_TROUBLE = re.compile("|".join(pattern.pattern for _, pattern in _TROUBLE))


@dataclass(frozen=True, slots=True)
class Finding:
    """One console line that tells of kernel trouble. `kind` is panic, oops, bug, warning, and so on."""

    kind: str
    line: str

    @property
    def message(self) -> str:
        """The line without the kernel's time stamp."""
        return without_time(self.line)


@dataclass(frozen=True, slots=True)
class BootFailure:
    """The guest's own account of why it could not boot."""

    stage: str
    reason: str


def without_time(line: str) -> str:
    """A line of the kernel's without its time stamp."""
    return re.sub(r"^\[\s*\d+\.\d+\]\s*(?:\[[^\]]*\]\s*)?", "", line)


def sanitize(text: str) -> str:
    """The text with everything unprintable escaped, so that a terminal shows it and obeys none of it."""
    # Nearly all lines are printable: a guest that floods its console must not cost a loop over each byte.
    return text if text.isprintable() else "".join(_safe(char) for char in text)


def scan(text: str) -> list[Finding]:
    """All signs of kernel trouble in a console log, in order, one per line at most."""
    examiner = Examiner()
    return [finding for line in text.splitlines() if (finding := examiner.examine(sanitize(line)))]


def examine(line: str) -> Finding | None:
    """What a single line tells of kernel trouble, if anything."""
    if _ANY_TROUBLE.search(line) is None:
        return None
    for kind, pattern in _TROUBLE:
        if pattern.search(line):
            return Finding(kind, line)
    return None


class Examiner:
    """Examines lines in their order: what a line means can depend on those before it.

    When memory runs out, a container's or the guest's, the kernel shows where it was before it says whom it
    kills. That call trace is no trouble of its own.
    """

    def __init__(self) -> None:
        self._report = 0

    def examine(self, line: str) -> Finding | None:
        self._report = _OOM_REPORT_LINES if "invoked oom-killer: " in line else max(0, self._report - 1)
        finding = examine(line)
        return None if finding is not None and finding.kind == "trace" and self._report else finding


class LineSplitter:
    """Cuts a byte stream into sanitized lines, each bounded however long the sender makes it."""

    def __init__(self) -> None:
        self._partial = b""

    def feed(self, data: bytes) -> list[str]:
        """The lines that `data` completes."""
        *whole, self._partial = (self._partial + data).split(b"\n")
        lines = [piece for line in whole for piece in _pieces(line)]
        if len(self._partial) >= _MAX_LINE_BYTES:
            *cut, self._partial = _pieces(self._partial)
            lines += cut
        return [_decode(line) for line in lines]

    def flush(self) -> list[str]:
        """The unfinished last line, if there is one: a dying kernel may not end it."""
        rest, self._partial = self._partial, b""
        return [_decode(rest)] if rest else []


class ConsoleMonitor:
    """Follows one boot.

    Attributes:
        stages: uptime in seconds at which the guest reported each stage.
        last_stage: the latest of them; "none" at first.
        failure: the guest's own report of a failed stage; the first one counts.
        findings: kernel trouble seen so far (bounded, oldest kept: the first one explains the others).
        bytes_seen: how much the guest has written.
    """

    def __init__(self, on_line: Callable[[str], None] | None = None) -> None:
        self.stages: dict[str, float] = {}
        self.last_stage = "none"
        self.failure: BootFailure | None = None
        self.findings: list[Finding] = []
        self.bytes_seen = 0
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._splitter = LineSplitter()
        self._on_line = on_line
        self._examiner = Examiner()

    def feed(self, data: bytes) -> None:
        """Takes console bytes as they come."""
        self.bytes_seen += len(data)
        for line in self._splitter.feed(data):
            self._take(line)

    def end(self) -> None:
        """The console is closed: an unfinished line counts as a line."""
        for line in self._splitter.flush():
            self._take(line)

    @property
    def ready(self) -> bool:
        """Whether the guest has reported the last stage."""
        return "ready" in self.stages

    @property
    def panic(self) -> Finding | None:
        """The kernel panic, if there was one."""
        return next((finding for finding in self.findings if finding.kind == "panic"), None)

    def lines(self) -> list[str]:
        """The console so far, sanitized, oldest lines dropped beyond a bound."""
        return list(self._lines)

    def relevant_lines(self, limit: int = 20) -> tuple[str, ...]:
        """What best explains a failure: the lines around the first trouble or failed stage, else the last."""
        lines, examiner = self.lines(), Examiner()
        for index, line in enumerate(lines):
            if examiner.examine(line) or _FAILED.search(line):
                start = max(0, index - 3)
                return tuple(lines[start : start + limit])
        return tuple(lines[-limit:])

    def _take(self, line: str) -> None:
        self._lines.append(line)
        if failed := _FAILED.search(line):
            self.failure = self.failure or BootFailure(failed[1], failed[2].strip())
        elif reached := _STAGE.search(line):
            self._reach(reached[1], float(reached[2]))
        elif (finding := self._examiner.examine(line)) and len(self.findings) < _KEPT_FINDINGS:
            self.findings.append(finding)
        if self._on_line is not None:
            self._on_line(line)

    def _reach(self, stage: str, uptime: float) -> None:
        if stage in STAGES:
            self.stages.setdefault(stage, uptime)
            self.last_stage = stage


def _pieces(line: bytes) -> list[bytes]:
    cuts = range(0, max(len(line), 1), _MAX_LINE_BYTES)
    return [line[start : start + _MAX_LINE_BYTES] for start in cuts]


def _decode(line: bytes) -> str:
    return sanitize(line.rstrip(b"\r").decode("utf-8", "replace"))


def _safe(char: str) -> str:
    if char.isprintable() or char == "\t":
        return char
    return char.encode("unicode_escape").decode("ascii")
