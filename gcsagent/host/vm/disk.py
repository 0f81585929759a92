"""Turns a root file system into a read-only virtio-blk disk.

A directory becomes an EROFS image in a scratch directory that the caller removes; a file is used in
place, once its superblock shows a file system the guest's kernel can mount.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gcsagent.host.vm.errors import DiskError, InvalidVmConfig
from gcsagent.host.vm.process import run
from gcsagent.host.vm.tools import MKFS_EROFS, find_tool
from gcsagent.host.vm.words import path_name_mode

# The disk that becomes a container's root; the guest mounts a disk at /run/gcs/disks/NAME.
ROOTFS = "rootfs"

# A disk's name travels as virtio-blk's serial number, of which the device keeps 20 bytes.
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,19}")

# name, offset of the magic number, its bytes. EROFS: fs/erofs/erofs_fs.h, 0xE0F5E1E2 little endian at 1024.
# squashfs: fs/squashfs/squashfs_fs.h. ext4: fs/ext4, 0xEF53 at 56 bytes into the superblock at 1024; ext2 and
# ext3 share it and the ext4 driver mounts them too.
_MAGICS = (("erofs", 1024, b"\xe2\xe1\xf5\xe0"), ("squashfs", 0, b"hsqs"), ("ext4", 1080, b"\x53\xef"))

_MKFS_DEADLINE = 600.0


@dataclass(frozen=True, slots=True)
class Disk:
    """One virtio-blk disk: image file or block device, name (the device's serial number), file system type.

    The guest mounts it while it boots if its type is given, else when it is told to (`storage.mount`).
    """

    path: Path
    name: str
    fstype: str = ""
    read_only: bool = True

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise InvalidVmConfig(
                f"disk name {self.name!r} must be 1 to 20 of a-z, 0-9, '_' and '-', not starting with a sign"
            )

    @classmethod
    def parse(cls, text: str) -> Disk:
        """`FILE[:NAME][:ro]`, not to be mounted; the name is the file's, less what cannot be in one.

        Raises:
            InvalidVmConfig: no such form, or the name cannot be one.
        """
        path, name, read_only = path_name_mode(text, "disk", "FILE[:NAME][:ro]")
        stem = re.sub(r"[^a-z0-9_-]+", "-", path.stem.lower()).strip("_-")[:20]
        return cls(path, stem if name is None else name, read_only=read_only)


def detect_fstype(path: Path) -> str:
    """The file system in an image file: erofs, squashfs or ext4.

    Raises:
        DiskError: the file cannot be read or holds none of them.
    """
    try:
        with path.open("rb") as file:
            head = file.read(2048)
    except OSError as error:
        raise DiskError(f"cannot read disk image {path}: {error.strerror}") from error
    for fstype, offset, magic in _MAGICS:
        if head[offset : offset + len(magic)] == magic:
            return fstype
    raise DiskError(f"{path} holds no file system that the guest can mount (EROFS, squashfs or ext4)")


async def rootfs_disk(
    rootfs: Path, scratch: Path, *, name: str = ROOTFS, env: Mapping[str, str] | None = None
) -> Disk:
    """A disk of the directory or image file `rootfs`; a directory's image is made in `scratch`.

    Raises:
        DiskError: no such path, not a usable image, or mkfs.erofs failed.
        ToolMissing: there is no mkfs.erofs.
    """
    path = _existing(rootfs)
    if path.is_dir():
        image = scratch / f"{name}.erofs"
        await make_erofs(path, image, env=env)
        return Disk(image, name, "erofs")
    return Disk(path, name, detect_fstype(path))


async def make_erofs(
    source: Path,
    image: Path,
    *,
    env: Mapping[str, str] | None = None,
    stamp: tuple[int, uuid.UUID] | None = None,
) -> None:
    """Writes the tree `source` to a new EROFS image, uncompressed: under emulation that reads fastest.

    With `stamp`, a time in seconds and an identity, the same tree makes the same bytes; files that are newer
    than that time get it (reproducible-builds.org, SOURCE_DATE_EPOCH).

    Files keep their owners, except that somebody who is not root gets all files of a tree of their own owned
    by root, as the container expects. What a failure leaves of the image is the caller's to remove.

    Raises:
        DiskError: mkfs.erofs failed or took more than 10 minutes.
        ToolMissing: there is no mkfs.erofs.
    """
    argv: list[str | Path] = [find_tool(MKFS_EROFS, env), "-d1", *_ownership(source), image, source]
    if stamp is not None:
        argv = ["env", f"SOURCE_DATE_EPOCH={stamp[0]}", argv[0], "-U", str(stamp[1]), *argv[1:]]
    try:
        status, said = await run(MKFS_EROFS, argv, _MKFS_DEADLINE)
    except TimeoutError:
        raise DiskError(f"mkfs.erofs of {source} took more than {_MKFS_DEADLINE:g} s") from None
    if status != 0:
        raise DiskError(f"mkfs.erofs of {source} exited {status}: {said or 'no output'}")


def _existing(path: Path) -> Path:
    try:
        return path.resolve(strict=True)
    except OSError as error:
        raise DiskError(f"root file system {path}: {error.strerror}") from error


def _ownership(source: Path) -> list[str]:
    own = os.geteuid() != 0 and source.stat().st_uid == os.geteuid()
    return ["--all-root"] if own else []
