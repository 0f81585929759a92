"""The directory that a snapshot of a VM is, complete or not there at all:

    snapshot.json    the record below
    memory           the guest's memory and devices, as QEMU wrote them; as secret as the guest
    disks/SERIAL     disks the guest could write to, as they were; and those made for that VM alone

Disks that nobody writes to stay where they are and are named with their size and time of change, which must
be the same when the snapshot is used. So do the kernel and the initramfs, which QEMU wants to have although
the guest has read them long ago.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from gcsagent.host.vm.errors import SnapshotError
from gcsagent.host.vm.places import data_dir
from protocol import checks

VERSION = 1
RECORD, MEMORY, DISKS = "snapshot.json", "memory", "disks"


@dataclass(frozen=True, slots=True)
class SavedDisk:
    """One disk of a saved VM.

    Attributes:
        serial: its serial number, and the name of its copy.
        path: where the original is.
        copied: whether the snapshot has a copy; else `size` and `mtime_ns` are the original's.
        port: the port it had been plugged into; empty: it was there since the boot.
    """

    serial: str
    fstype: str
    path: str
    read_only: bool
    copied: bool
    size: int = 0
    mtime_ns: int = 0
    port: str = ""


@dataclass(frozen=True, slots=True)
class SavedNic:
    """A network card that had been plugged in, and where."""

    mac: str
    port: str


@dataclass(frozen=True, slots=True)
class Saved:
    """What is recorded of one snapshot.

    Attributes:
        snapshot: its id in the guest.
        vm: the VM's name.
        config: its VmConfig as JSON, less what is not the guest's.
        accel: kvm or tcg.
        machine: QEMU's machine type with its version, which a newer QEMU knows as well.
        qemu: QEMU's version.
        created: seconds since the epoch.
        stopped_seconds: for how long the guest stood still.
    """

    snapshot: str
    vm: str
    config: dict[str, Any]
    accel: str
    machine: str
    qemu: str
    created: float
    stopped_seconds: float
    disks: tuple[SavedDisk, ...]
    nics: tuple[SavedNic, ...]
    version: int = VERSION

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def write(self, directory: Path) -> None:
        """Raises OSError."""
        text = json.dumps(self.to_json(), indent=1) + "\n"
        (directory / RECORD).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, directory: Path) -> Saved:
        """Raises SnapshotError: there is none, or it is not to be used."""
        try:
            data = json.loads((directory / RECORD).read_text(encoding="utf-8"))
            if data["version"] > VERSION:
                raise SnapshotError(f"{directory} was made by a newer gcsctl: version {data['version']}")
            known = {field.name for field in fields(cls)}
            values = {key: value for key, value in data.items() if key in known}
            values["disks"] = tuple(SavedDisk(**each) for each in data["disks"])
            values["nics"] = tuple(SavedNic(**each) for each in data["nics"])
            return cls(**values)
        except FileNotFoundError:
            raise SnapshotError(f"{directory} is no snapshot: there is no {RECORD}") from None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise SnapshotError(f"{directory / RECORD} is damaged: {error}") from error


def size(directory: Path) -> int:
    """Bytes of disk it takes; of what is being removed, those still there."""
    total = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.lstat(os.path.join(parent, name)).st_blocks * 512
    return total


def unfinished(directory: Path) -> Path:
    """What the snapshot is called while it is made."""
    return directory.with_name(f".new-{directory.name}-{os.getpid()}")


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Somebody is at it: in the block :func:`sweep` lets it be. Raises OSError."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(fd)


def sweep(directory: Path) -> None:
    """Removes what killed ones have left of this snapshot, half made or half removed: a guest's memory."""
    left = re.compile(rf"\.(?:new|old)-{re.escape(directory.name)}-[0-9]+")
    with suppress(OSError):
        for path in directory.parent.iterdir():
            if left.fullmatch(path.name):
                with suppress(OSError), held(path):
                    shutil.rmtree(path)


class SnapshotStore:
    """Snapshots by name: $XDG_DATA_HOME/gcsctl/snapshots; without that variable /var/lib/gcsctl/snapshots for
    root, and ~/.local/share/gcsctl/snapshots for anybody else."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root if root is not None else data_dir() / "snapshots"

    def directory(self, name: str) -> Path:
        """Where the snapshot `name` is or will be; with a slash it is the directory itself.

        Raises:
            SnapshotError: not a possible name.
        """
        if "/" in name:
            return Path(name).absolute()
        problem = checks.identifier(name)
        if problem is not None:
            raise SnapshotError(f"snapshot name {name!r} {problem}")
        return self.root / name

    def list(self, damaged: Callable[[SnapshotError], None] = lambda error: None) -> list[tuple[str, Saved]]:
        """All of them, by name; `damaged` is told of each that cannot be used."""
        if not self.root.is_dir():
            return []
        found = []
        for path in sorted(self.root.iterdir()):
            if checks.identifier(path.name) is not None:
                continue
            try:
                found.append((path.name, Saved.load(path)))
            except SnapshotError as error:
                if (path / RECORD).exists():  # else it is none, or has just been removed
                    damaged(error)
        return found

    def remove(self, name: str) -> None:
        """Removes it, under another name first. VMs made from it go on.

        Raises:
            SnapshotError: there is none, or it cannot be removed.
        """
        directory = self.directory(name)
        if not (directory / RECORD).is_file():
            raise SnapshotError(f"no snapshot {name!r}; `gcsctl vm snapshot ls` lists them")
        sweep(directory)
        trash = directory.with_name(f".old-{directory.name}-{os.getpid()}")
        try:
            with held(directory):
                os.rename(directory, trash)
                shutil.rmtree(trash)
        except OSError as error:
            raise SnapshotError(f"cannot remove {directory}: {error.strerror}") from error
