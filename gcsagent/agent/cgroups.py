"""A container's cgroup, wherever this machine keeps cgroups: v2, v1, or both at once.

Features are looked for per file and not per version: hybrid hosts have some of each.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections.abc import Iterator

from protocol.dataclass import dataclass

MOUNTS = "/proc/self/mounts"


FREEZERS = ("cgroup.freeze", "freezer.state")
"""v2's file and v1's."""


@dataclass(frozen=True, slots=True)
class OomCounts:
    kills: int
    """Processes the kernel has killed in a cgroup for want of memory, whoever's."""
    limits: int | None
    """How often it was the cgroup's own limit, or one below it; None where that is not counted (v1)."""


_CONTROLLERS = frozenset(
    ("blkio", "cpu", "cpuacct", "cpuset", "devices", "freezer", "hugetlb", "memory", "pids", "rdma")
)
"""cgroups(7): what a v1 hierarchy's mount options say it has, and what the names of its files begin with."""


class CgroupMounts:
    """The hierarchies of this machine, read once; one that is mounted twice counts once."""

    def __init__(self, mounts_file: str = MOUNTS) -> None:
        self._v1: list[str] = []
        self._v2: list[str] = []
        self._has: dict[str, frozenset[str]] = {}  # v1: controllers by mount point
        seen: set[tuple[int, int]] = set()
        # Whatever others have mounted and called; a carriage return ends no line.
        with open(mounts_file, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
            for line in file:
                _, point, kind, options, *_ = line.split(" ")
                if kind in ("cgroup", "cgroup2") and _is_new(point, seen):
                    (self._v1 if kind == "cgroup" else self._v2).append(point)
                    self._has[point] = frozenset(
                        word for word in options.split(",") if word in _CONTROLLERS or word[:5] == "name="
                    )

    @property
    def version(self) -> str:
        """``v2``, ``v1``, ``hybrid`` or ``none``."""
        if self._v1:
            return "hybrid" if self._v2 else "v1"
        return "v2" if self._v2 else "none"

    def directories(self, path: str) -> list[str]:
        """Where ``path`` (as in the OCI spec's cgroupsPath) exists, in every hierarchy."""
        return _existing(self._v2 + self._v1, path)

    def places(self, path: str, name: str) -> list[str]:
        """Where it would be in every hierarchy that may have a file ``name``; opening that says if it is."""
        wanted, points = name.partition(".")[0], self._v2 + self._v1
        if wanted in _CONTROLLERS:
            points = [point for point in points if not self._has[point] or wanted in self._has[point]]
        return [point + path for point in points]

    def v2_directories(self, path: str) -> list[str]:
        return _existing(self._v2, path)


def _is_new(point: str, seen: set[tuple[int, int]]) -> bool:
    """Whether it is not one of ``seen``, mounted elsewhere as well."""
    try:
        status = os.stat(point)
    except OSError:
        return True
    root = status.st_dev, status.st_ino
    if root in seen:
        return False
    seen.add(root)
    return True


def _existing(points: list[str], path: str) -> list[str]:
    return [directory for point in points if os.path.isdir(directory := point + path)]


class Cgroup:
    def __init__(self, mounts: CgroupMounts, path: str) -> None:
        self._mounts, self.path = mounts, path

    def parent(self) -> Cgroup:
        return Cgroup(self._mounts, os.path.dirname(self.path))

    def pids(self) -> set[int]:
        """Every process in it or below it, in whichever hierarchy has any."""
        return _processes(self._mounts.directories(self.path))

    def thaw(self) -> None:
        """Lets everything in it and below it run on."""
        for path in self._freezers():
            text = b"THAWED" if path.endswith("freezer.state") else b"0"
            with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
                file.write(text)

    def frozen(self) -> bool:
        """Whether it has been frozen or is about to be; what it froze below that is its own affair."""
        words = (text.strip() for name in FREEZERS for text in self.read(name))
        return any(word not in ("THAWED", "0") for word in words)

    def _freezers(self) -> Iterator[str]:
        for directory in self._mounts.directories(self.path):
            for parent, _, files in os.walk(directory):
                for name in FREEZERS:
                    if name in files:
                        yield os.path.join(parent, name)

    def kill_at_once(self) -> bool:
        """SIGKILLs everything in it by one write (Linux 5.14); False where that does not reach all."""
        if not self.all_in_v2():
            return False
        try:
            self._write("cgroup.kill", b"1")
        except OSError:
            return False
        return True

    def all_in_v2(self) -> bool:
        """Whether the v2 hierarchy is where its processes are; a hybrid host may have them elsewhere."""
        if self._mounts.version == "v2":
            return True
        everybody = self.pids()
        tops = self._mounts.v2_directories(self.path)
        return bool(tops) and everybody <= _processes(tops)

    def freeze(self) -> None:
        """Begins to."""
        if self._frozen_by_v2():
            self._try_write("cgroup.freeze", b"1")
        else:
            self._try_write("freezer.state", b"FROZEN")

    def unfreeze(self) -> None:
        """It as a whole; a cgroup in it that has been frozen on its own stays so."""
        self._try_write("cgroup.freeze", b"0")
        self._try_write("freezer.state", b"THAWED")

    def is_frozen(self) -> bool:
        """As a whole, or about to be."""
        return any(text.strip() == "1" for text in self.read("cgroup.freeze")) or any(
            text.strip() != "THAWED" for text in self.read("freezer.state")
        )

    def stands_still(self) -> bool:
        """It is being frozen, and nothing in it runs any more."""
        if self._frozen_by_v2():
            return any("frozen 1" in text.splitlines() for text in self.read("cgroup.events"))
        return any(text.strip() == "FROZEN" for text in self.read("freezer.state"))

    def _frozen_by_v2(self) -> bool:
        return self.all_in_v2() and self.file("cgroup.freeze") is not None

    def _try_write(self, name: str, text: bytes) -> None:
        with contextlib.suppress(OSError):
            self._write(name, text)

    def _write(self, name: str, text: bytes) -> None:
        """Raises OSError; never makes the file."""
        path = self.file(name)
        if path is None:
            raise FileNotFoundError(f"{self.path} has no {name}")
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        with open(fd, "wb", buffering=0) as file:
            file.write(text)

    def read(self, name: str) -> list[str]:
        """The text of this file in every hierarchy that has it, v2 first."""
        found = []
        for directory in self._mounts.places(self.path, name):
            with (
                contextlib.suppress(OSError),
                open(os.path.join(directory, name), encoding="ascii", errors="replace") as file,
            ):
                found.append(file.read())
        return found

    def write(self, name: str, text: str) -> None:
        """To this file in every hierarchy that has it. Raises OSError; FileNotFoundError when none has."""
        found = False
        for directory in self._mounts.places(self.path, name):
            path = os.path.join(directory, name)
            if os.path.exists(path):
                found = True
                with open(path, "wb", buffering=0) as file:
                    file.write(text.encode("ascii"))
        if not found:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)

    def children(self) -> set[str]:
        """Names of the cgroups directly below it."""
        names: set[str] = set()
        for directory in self._mounts.directories(self.path):
            with os.scandir(directory) as entries:
                names.update(entry.name for entry in entries if entry.is_dir())
        return names

    def file(self, name: str) -> str | None:
        """Where this file of it is, in the first hierarchy that has it."""
        for directory in self._mounts.places(self.path, name):
            path = os.path.join(directory, name)
            if os.path.exists(path):
                return path
        return None

    def oom_counts(self) -> OomCounts:
        """What the kernel has counted in it; all 0 where it counts nothing."""
        for name in ("memory.events", "memory.oom_control"):
            for text in self.read(name):
                counts = dict(_pairs(text))
                if "oom_kill" in counts:
                    return OomCounts(counts["oom_kill"], counts.get("oom"))
        return OomCounts(0, None)

    def limited_above(self) -> bool:
        """Whether a cgroup above it has a limit on memory (v2)."""
        above = os.path.dirname(self.path)
        while above != "/":
            if any(text.strip() != "max" for text in Cgroup(self._mounts, above).read("memory.max")):
                return True
            above = os.path.dirname(above)
        return False

    def remove(self) -> list[str]:
        """Removes its directories, deepest first; returns those that could not be (still populated)."""
        left = []
        for directory in self._mounts.directories(self.path):
            for parent, _, _ in os.walk(directory, topdown=False):
                try:
                    os.rmdir(parent)
                except FileNotFoundError:
                    continue
                except OSError:
                    left.append(parent)
        return left

    def remove_empty(self) -> None:
        """Removes its own directories where nothing is in them; the kernel refuses the others."""
        for directory in self._mounts.directories(self.path):
            with contextlib.suppress(OSError):
                os.rmdir(directory)


def _processes(directories: list[str]) -> set[int]:
    found: set[int] = set()
    for directory in directories:
        for parent, _, files in os.walk(directory):
            if "cgroup.procs" in files:
                found.update(_numbers(os.path.join(parent, "cgroup.procs")))
    return found


def signal_all(pids: set[int], number: int) -> int:
    """Signals each through a pidfd, so that a pid used again meanwhile is never hit; returns how many."""
    sent = 0
    for pid in pids:
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            signal.pidfd_send_signal(fd, number)
            sent += 1
        except ProcessLookupError:
            continue
        finally:
            os.close(fd)
    return sent


def _numbers(path: str) -> Iterator[int]:
    try:
        with open(path, encoding="ascii") as file:
            yield from (int(line) for line in file)
    except OSError:
        return


def _pairs(text: str) -> Iterator[tuple[str, int]]:
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        if value.isascii() and value.strip().isdigit():
            yield key, int(value)
