"""What the kernel's log says about processes it killed for want of memory.

Two lines per kill matter (mm/oom_kill.c)::

    oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=web,mems_allowed=0,oom_memcg=/gcs/web,
        task_memcg=/gcs/web,task=python3,pid=1234,uid=0
    Memory cgroup out of memory: Killed process 1234 (python3) total-vm:82104kB, anon-rss:39552kB, ...

The first comes before the kill and is left out when there are many; the second comes with it. A command is
whatever the process has called itself, and a cgroup inside a container is named by the container: pids are
taken from where neither can reach. What user space writes into the log has a facility of its own and is
passed over (Documentation/ABI/testing/dev-kmsg).
"""

from __future__ import annotations

import contextlib
import os
import re

from protocol.dataclass import dataclass, replace

KMSG = "/dev/kmsg"
RECORD = 8192
_MOST_KILLS = 64
_INITIAL_PID_NAMESPACE = 0xEFFFFFFC  # PROC_PID_INIT_INO, linux/proc_ns.h

_ANNOUNCED = re.compile(
    r"oom-kill:constraint=(CONSTRAINT_\w+),.*?,(?:oom_memcg=(.*),|global_oom,)"
    r"task_memcg=(.*),task=(.*),pid=(\d+),uid=\d+$",
    re.DOTALL,
)
_KILLED = re.compile(r"(.{0,64}?[Oo]ut of memory[^:]*): Killed process (\d+) \((.*)\) total-vm:", re.DOTALL)
_GROUP = re.compile(r"Tasks in (.*) are going to be killed due to memory\.oom\.group set$", re.DOTALL)
_MARKS = (b"oom-kill:constraint=", b": Killed process ", b" are going to be killed due to memory.oom.group")
_ESCAPED = re.compile(rb"\\x([0-9a-f]{2})")


@dataclass(frozen=True, slots=True)
class Kill:
    """One kill. The cgroups are paths below the cgroup root; empty where the log did not say."""

    pid: int
    command: str
    machine: bool
    """The machine's memory ran out, not a cgroup's."""
    limit_cgroup: str = ""
    """Whose limit was reached."""
    cgroup: str = ""
    """The one the process was in."""


@dataclass(frozen=True, slots=True)
class Record:
    """One line of the log. ``micros`` since the kernel started; ``facility`` 0 is the kernel itself."""

    priority: int
    facility: int
    number: int
    micros: int
    text: str


def parse_record(record: bytes) -> Record | None:
    """``record`` as one read of /dev/kmsg gives it; None for what is none."""
    head, _, body = record.partition(b";")
    words = head.split(b",")
    if len(words) < 3 or not all(word.isdigit() for word in words[:3]):
        return None
    priority, number, micros = (int(word) for word in words[:3])
    line = _ESCAPED.sub(lambda match: bytes([int(match[1], 16)]), body.partition(b"\n")[0])
    return Record(priority & 7, priority >> 3, number, micros, line.decode("utf-8", "replace"))


class KillLog:
    """Puts lines of the log together. ``kills`` are those not taken yet by pid, oldest first, bounded."""

    def __init__(self) -> None:
        self.kills: dict[int, Kill] = {}
        self._group: Kill | None = None  # what all that are killed with one by memory.oom.group share

    def take_record(self, record: bytes) -> None:
        """``record`` as one read of /dev/kmsg gives it."""
        if not any(mark in record for mark in _MARKS):
            return  # most of the log is about something else
        found = parse_record(record)
        if found is not None and not found.facility:
            self._take_line(found.text)

    def _take_line(self, line: str) -> None:
        if match := _ANNOUNCED.match(line):
            constraint, limit, cgroup, command, pid = match.groups()
            self._group = None
            self._keep(Kill(int(pid), command, constraint != "CONSTRAINT_MEMCG", limit or "", cgroup))
        elif match := _KILLED.match(line):
            pid, machine = int(match[2]), not match[1].startswith("Memory cgroup")
            known = self.kills.get(pid) or self._group or Kill(pid, "", machine)
            self._keep(replace(known, pid=pid, command=match[3], machine=machine))
        elif (match := _GROUP.match(line)) and self.kills:
            newest = next(reversed(self.kills.values()))
            self._group = replace(newest, cgroup=match[1])

    def _keep(self, kill: Kill) -> None:
        self.kills.pop(kill.pid, None)
        self.kills[kill.pid] = kill
        if len(self.kills) > _MOST_KILLS:
            del self.kills[next(iter(self.kills))]


class KernelLog(KillLog):
    """The log itself. It is read when there is reason to, from where the last reading stopped.

    Without the right to read it, or in a pid namespace whose numbers are not the log's, ``fd`` is -1 and
    there are never any kills.
    """

    def __init__(self, path: str = KMSG) -> None:
        super().__init__()
        self.fd = -1
        if os.stat("/proc/self/ns/pid").st_ino == _INITIAL_PID_NAMESPACE:
            with contextlib.suppress(OSError):
                self.fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    def read(self) -> None:
        """Takes up what has been written since the last time."""
        while self.fd >= 0:
            try:
                self.take_record(os.read(self.fd, RECORD))
            except BlockingIOError:
                return
            except BrokenPipeError:
                continue  # some were overwritten before they were read; the next read has the oldest left
            except OSError:
                os.close(self.fd)
                self.fd = -1
