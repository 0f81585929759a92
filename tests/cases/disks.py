"""Disk images for tests: empty, with a file system, and with a tree of dm-verity hashes behind it."""

from __future__ import annotations

import base64
import hashlib
import struct
import subprocess
import zlib
from pathlib import Path

from tests.cases.target import MIB

BLOCK = 4096
_SQUASHFS = (
    "eNrLKC4sZmKAASYGRiDJxiDIcADIYgGyFaAyX6H0Wyj9HwoyofyZUPoolL4PpYsLSxOLM1JTuPQYNLbq/1Vw0GVkOMHEsIQRaD4n"
    "UJ6R4S0jA5M0kMUMxCwM6wUVrB2SxDMYJRpgjmKEO46ZIS0zJ1WgIQEqwgmV3AzlC8D1wJx9FkqzgGWeQ3kAPCUhCg=="
)
"""Of mksquashfs: one file called file, holding ``squashed``."""


def empty(path: Path, size: int = 64 * MIB) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


def squashfs(path: Path) -> Path:
    path.write_bytes(zlib.decompress(base64.b64decode(_SQUASHFS)).ljust(BLOCK, b"\0"))
    return path


def erofs(path: Path, **files: str) -> Path:
    """With these files and their contents."""
    tree = path.with_suffix(".d")
    tree.mkdir()
    for name, content in files.items():
        (tree / name).write_text(content)
    subprocess.run(["mkfs.erofs", "--quiet", path, tree], check=True, timeout=60, capture_output=True)
    return path


def verity(data: bytes, salt: bytes = b"salt of a test") -> tuple[bytes, str]:
    """The superblock and tree of hashes for whole blocks of ``data``, and the root hash.

    As veritysetup makes them (format 1): salt before what is hashed, the level of the root first.
    """

    def digest(block: bytes) -> bytes:
        return hashlib.sha256(salt + block).digest()

    levels = [data]
    while len(levels[-1]) > BLOCK:
        blocks = [levels[-1][at : at + BLOCK] for at in range(0, len(levels[-1]), BLOCK)]
        hashes = b"".join(map(digest, blocks))
        levels.append(hashes.ljust(-(-len(hashes) // BLOCK) * BLOCK, b"\0"))
    superblock = struct.pack(
        "<8sII16s32sIIQH6x256s168x",
        *(b"verity\0\0", 1, 1, bytes(16), b"sha256", BLOCK, BLOCK, len(data) // BLOCK, len(salt), salt),
    )
    tree = superblock.ljust(BLOCK, b"\0") + b"".join(reversed(levels[1:]))
    return tree, digest(levels[-1]).hex()
