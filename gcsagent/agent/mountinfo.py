"""What the kernel says is mounted (proc_pid_mountinfo(5))."""

from __future__ import annotations

import re

from protocol.dataclass import dataclass

_ESCAPE = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mounted:
    ident: int
    """Unique among the mounts there are now; the kernel gives it to another as soon as this one is gone."""
    device: str
    root: str
    """The directory, or file, of its file system that is to be seen."""
    point: str
    fstype: str
    source: str
    options: tuple[str, ...]
    """Of the mount and of its file system."""

    def what(self) -> list[str]:
        """What is mounted, wherever that is."""
        return [self.device, self.root, self.fstype]

    def layers(self) -> list[str]:
        """The directories an overlay is made of."""
        found = []
        for option in self.options:
            name, _, value = option.partition("=")
            if name in ("lowerdir", "lowerdir+", "datadir+"):
                found += value.split(":")
            elif name in ("upperdir", "workdir"):
                found.append(value)
        return found


def read(path: str = "/proc/self/mountinfo") -> list[Mounted]:
    """Every mount; of those on one directory the last is on top."""
    # A carriage return is part of a name like any other character.
    with open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        return [parse(line) for line in file]


def parse(line: str) -> Mounted:
    mount, _, filesystem = line.rstrip("\n").partition(" - ")
    ident, _, device, root, point, options, *_ = mount.split(" ")
    fstype, source, more = filesystem.split(" ", 2)
    both = (*options.split(","), *_unescaped(more).split(","))
    return Mounted(int(ident), device, _unescaped(root), _unescaped(point), fstype, _unescaped(source), both)


def at(point: str, mounts: list[Mounted]) -> list[Mounted]:
    """Those on exactly this directory, the one that is seen last."""
    return [mount for mount in mounts if mount.point == point]


def below(path: str, top: str) -> bool:
    """Whether ``path`` is ``top`` or inside it, by name."""
    return path == top or path.startswith(top.rstrip("/") + "/")


def _unescaped(text: str) -> str:
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), text)
