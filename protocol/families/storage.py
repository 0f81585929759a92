"""``storage.*``: disks, layers and file systems that containers are made from and given."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from protocol import checks, mountchecks
from protocol.dataclass import dataclass
from protocol.limits import MAX_MOUNTS
from protocol.method import QUICK, RUNTIME, Empty, Method


class MountKind(StrEnum):
    """What is mounted. Each kind has fields of its own in ``storage.mount``; the others' are refused."""

    BLOCK = "block"
    """A file system on a block device: `device`, `fstype`, `format`, `verity`."""
    VIRTIOFS = "virtiofs"
    """A directory that the host shares: `tag`."""
    TMPFS = "tmpfs"
    """A new one in memory: `size_bytes`."""
    BIND = "bind"
    """A directory or file of the guest, once more: `path`."""
    OVERLAY = "overlay"
    """Layers over each other: `lower`, `upper`, `work`."""
    SWAP = "swap"
    """A block device as swap space: `device`, `format`. It has no target."""


class FsType(StrEnum):
    """File systems that a block device may hold."""

    EXT4 = "ext4"
    """ext2 and ext3, too: one driver reads all three."""
    XFS = "xfs"
    """XFS."""
    EROFS = "erofs"
    """Read-only, made on the host."""
    SQUASHFS = "squashfs"
    """Read-only, made on the host."""


class Format(StrEnum):
    """Whether a device may be written a new file system."""

    NEVER = "never"
    """One without a file system is refused."""
    ON_FIRST_USE = "on_first_use"
    """One that begins with nothing but zeros is given one; what holds anything is never overwritten."""


class MountStatus(StrEnum):
    """Where a mount stands."""

    MOUNTING = "mounting"
    """Under way: a device is waited for, or the kernel is at work."""
    MOUNTED = "mounted"
    """There, and in use by nobody or somebody."""
    UNMOUNTING = "unmounting"
    """On its way out."""
    FAILED = "failed"
    """It could not be undone; `problem` says why. Unmount it again when that is solved."""


@dataclass(frozen=True, slots=True)
class Device:
    """A block device, by exactly one of these. It may come later: its arrival is waited for."""

    serial: mountchecks.DeviceName | None = None
    """Its serial number, of which virtio-blk keeps 20 bytes."""
    pci: mountchecks.PciPath | None = None
    """Address of its PCI function, or the slots on the way there from the first bus."""
    virtio: mountchecks.VirtioName | None = None
    """Its name on the virtio bus."""
    path: mountchecks.ExactPath | None = None
    """Its node in the guest's /dev."""


@dataclass(frozen=True, slots=True)
class Verity:
    """dm-verity: each block is checked as it is read; the device must have veritysetup's superblock."""

    root_hash: mountchecks.RootHash
    """What the tree of hashes must come to."""
    hash_device: Device | None = None
    """Where that tree is; absent: on the same device, behind the data."""
    hash_offset: Annotated[int, checks.Between(0, 1 << 60)] = 0
    """Byte at which the tree's superblock begins."""


@dataclass(frozen=True, slots=True)
class MountStorage:
    """Mounts something. The same request under the same id gives the same answer; another id may hold the
    same mount, which is there until the last of them is unmounted."""

    mount: checks.Id
    """The caller's name for it; for each of its holders another one."""
    kind: MountKind
    """What is mounted."""
    target: mountchecks.ExactPath | None = None
    """Where, in the guest; absent: `/run/gcs/mounts/` and its id. Missing directories are made, and removed
    with it."""
    device: Device | None = None
    """Which block device."""
    fstype: FsType | None = None
    """What it holds; absent: what its superblock says."""
    format: Format = Format.NEVER
    """Whether an empty device is given a file system, or swap space."""
    verity: Verity | None = None
    """Check all that is read from it."""
    tag: mountchecks.DeviceName | None = None
    """The virtiofs tag. It may come later, as a device may."""
    size_bytes: Annotated[int, checks.Between(4096, 1 << 50)] | None = None
    """How much a tmpfs may hold; absent: half of the guest's memory."""
    path: mountchecks.ExactPath | None = None
    """What is bound."""
    lower: tuple[mountchecks.ExactPath, ...] = ()
    """The overlay's layers, the topmost first."""
    upper: mountchecks.ExactPath | None = None
    """Where what is written to the overlay goes; absent: it is read-only."""
    work: mountchecks.ExactPath | None = None
    """The overlay's working directory, on the file system of `upper`."""
    options: tuple[mountchecks.MountOption, ...] = ()
    """Options of the file system, as mount(8) takes them, each for itself."""
    read_only: bool = False
    """Nobody can write to it."""
    wait_ms: Annotated[int, checks.Between(0, 600_000)] = 10_000
    """How long a device or tag that is not there yet is waited for."""


@dataclass(frozen=True, slots=True)
class MountState:
    mount: checks.Id
    """The id asked for; in lists, that of its first holder."""
    kind: MountKind
    """What is mounted."""
    status: MountStatus
    """Where it stands."""
    target: str = ""
    """Where it is; empty for swap."""
    source: str = ""
    """What the kernel was given: a device's node, a tag, a path, how many layers."""
    fstype: str = ""
    """File system type, as the kernel names it."""
    read_only: bool = False
    """Whether it can be written to."""
    formatted: bool = False
    """Whether its file system was made by this mount."""
    holders: tuple[str, ...] = ()
    """Every id it is mounted under."""
    frozen_ms: int = 0
    """How long it is going to be frozen from now on; 0 when it is not."""
    problem: str = ""
    """Why it failed."""


@dataclass(frozen=True, slots=True)
class UnmountStorage:
    """Drops a holder, and unmounts when it was the last."""

    mount: checks.Id
    dependents: bool = False
    """Unmount first the mounts that lie on it or are made from it, whoever holds them, newest first."""


@dataclass(frozen=True, slots=True)
class Unmounted:
    unmounted: tuple[str, ...] = ()
    """Ids that are mounted no more, in that order; empty: others still hold it."""


@dataclass(frozen=True, slots=True)
class ListMounts:
    """One page of the mounts, oldest first; the next is asked for ``after`` the last of this one."""

    after: str = ""
    """Only mounts that came later than the one with this id. `NOT_FOUND` once that is gone: begin anew."""
    limit: Annotated[int, checks.Between(1, MAX_MOUNTS)] = MAX_MOUNTS
    """At most so many."""


@dataclass(frozen=True, slots=True)
class MountList:
    mounts: tuple[MountState, ...] = ()
    """In the order they were mounted."""
    left_out: int = 0
    """How many there are beyond these: more than ``limit``, or than a message holds."""


@dataclass(frozen=True, slots=True)
class MountRef:
    mount: checks.Id


@dataclass(frozen=True, slots=True)
class Trimmed:
    bytes: int
    """Given back to the device, at the most; a device that knows what is free already may count it again."""


@dataclass(frozen=True, slots=True)
class FreezeStorage:
    """Flushes a file system and holds off all who write to it, until ``storage.thaw`` or for that long."""

    mount: checks.Id
    for_ms: Annotated[int, checks.Between(1, 600_000)] = 60_000
    """It thaws by itself after so long, should nobody ask for it."""


METHODS = (
    Method("storage.mount", MountStorage, MountState, RUNTIME, True, "it is mounted and written down"),
    Method("storage.unmount", UnmountStorage, Unmounted, RUNTIME, True, "unmounting has begun"),
    Method("storage.list", ListMounts, MountList, QUICK),
    Method("storage.trim", MountRef, Trimmed, RUNTIME, True, "fstrim has ended"),
    Method("storage.freeze", FreezeStorage, Empty, RUNTIME, True, "the file system is frozen"),
    Method("storage.thaw", MountRef, Empty, RUNTIME, True, "the file system is thawed"),
)
