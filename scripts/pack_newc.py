#!/usr/bin/python3
"""Writes a folder as a "newc" cpio archive, the format of an initramfs, to standard output.

    pack_newc.py FOLDER TIME

The bytes depend on names, modes and contents alone: members are sorted, belong to root, bear TIME (seconds
since 1970) and count inodes from 1. Not cpio(1), whose --reproducible (2.13) keeps a folder's link count,
which is another one on every file system.

The format: Documentation/driver-api/early-userspace/buffer-format.rst in the kernel's source.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def walk(folder: Path) -> Iterator[Path]:
    """Everything below `folder`, a folder before what it holds, by the bytes of the names."""
    for path in sorted(folder.iterdir(), key=lambda each: os.fsencode(each.name)):
        yield path
        if path.is_dir() and not path.is_symlink():
            yield from walk(path)


def write_member(out: BinaryIO, name: bytes, inode: int, mode: int, time: int, data: bytes) -> None:
    # ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
    links = 2 if stat.S_ISDIR(mode) else 1
    fields = (inode, mode, 0, 0, links, time, len(data), 0, 0, 0, 0, len(name) + 1, 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields) + name + bytes(1)
    out.write(header + bytes(-len(header) % 4))
    out.write(data + bytes(-len(data) % 4))


def pack(folder: Path, time: int, out: BinaryIO) -> None:
    """Raises ValueError for what an image has no business with: devices, sockets, named pipes."""
    for inode, path in enumerate(walk(folder), 1):
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            # A link's permissions mean nothing and differ between file systems.
            mode, data = stat.S_IFLNK | 0o777, os.fsencode(path.readlink())
        elif stat.S_ISREG(mode):
            data = path.read_bytes()
        elif stat.S_ISDIR(mode):
            data = b""
        else:
            raise ValueError(f"{path} is neither file nor folder nor link")
        write_member(out, os.fsencode(path.relative_to(folder)), inode, mode, time, data)
    write_member(out, b"TRAILER!!!", 0, 0, 0, b"")


if __name__ == "__main__":
    pack(Path(sys.argv[1]), int(sys.argv[2]), sys.stdout.buffer)
