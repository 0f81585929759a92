"""What a block device holds, by the first bytes of it, and what its dm-verity superblock says.

Sources: the kernel's fs/*/ and include/uapi/linux/magic.h for magic numbers, cryptsetup's
docs/on-disk-format of VERITY for the superblock, Documentation/admin-guide/device-mapper/verity.rst for the
table made from it.
"""

from __future__ import annotations

import struct

from protocol.dataclass import dataclass

HEAD = 68 * 1024
"""Bytes looked at: btrfs has its magic number at 65,600."""

SECTOR = 512

_MAGICS = (
    ("ext4", 1080, b"\x53\xef"),
    ("xfs", 0, b"XFSB"),
    ("erofs", 1024, b"\xe2\xe1\xf5\xe0"),
    ("squashfs", 0, b"hsqs"),
    ("swap", 4086, b"SWAPSPACE2"),
    ("btrfs", 65600, b"_BHRfS_M"),
    ("dm-verity hashes", 0, b"verity\0\0"),
    ("LUKS", 0, b"LUKS\xba\xbe"),
    ("LVM", 512, b"LABELONE"),
    ("a GPT partition table", 512, b"EFI PART"),
    ("ISO 9660", 32769, b"CD001"),
    ("a partition table or FAT", 510, b"\x55\xaa"),
)
EMPTY, UNKNOWN = "", "something that is none of the file systems known"


def held(head: bytes) -> str:
    """A file system's name, EMPTY for nothing but zeros, or what else it is."""
    for name, offset, magic in _MAGICS:
        if head[offset : offset + len(magic)] == magic:
            return name
    return UNKNOWN if head.strip(b"\0") else EMPTY


_VERITY = struct.Struct("<8sII16s32sIIQH6x256s")
"""signature, version, hash type, uuid, algorithm, data and hash block size, data blocks, salt size, salt."""


class BadSuperblock(ValueError):
    """Not a verity superblock that can be used; the message says why."""


@dataclass(frozen=True, slots=True)
class VeritySuperblock:
    hash_type: int
    algorithm: str
    data_block: int
    hash_block: int
    data_blocks: int
    salt: bytes

    @classmethod
    def parse(cls, data: bytes) -> VeritySuperblock:
        """Raises BadSuperblock."""
        if len(data) < _VERITY.size or data[:8] != b"verity\0\0":
            raise BadSuperblock("there is no dm-verity superblock")
        _, version, kind, _, name, data_block, hash_block, blocks, salt_size, salt = _VERITY.unpack_from(data)
        algorithm = name.rstrip(b"\0").decode("ascii", errors="replace")
        sizes = all(size & (size - 1) == 0 and 512 <= size <= 1 << 19 for size in (data_block, hash_block))
        if version != 1 or kind not in (0, 1) or not sizes or salt_size > 256 or not 0 < blocks < 1 << 50:
            raise BadSuperblock("the dm-verity superblock has values out of bounds")
        if not algorithm.replace("-", "").isalnum():
            raise BadSuperblock("the dm-verity superblock names no hash algorithm")
        return cls(kind, algorithm, data_block, hash_block, blocks, salt[:salt_size])

    def table(self, data_device: str, hash_device: str, hash_offset: int, root_hash: str) -> str:
        """One line for dmsetup: start and length in sectors, ``verity``, its arguments."""
        start = -(-(hash_offset + SECTOR) // self.hash_block)  # the tree begins in the next whole block
        length = self.data_blocks * self.data_block // SECTOR
        return (
            f"0 {length} verity {self.hash_type} {data_device} {hash_device} {self.data_block}"
            f" {self.hash_block} {self.data_blocks} {start} {self.algorithm} {root_hash}"
            f" {self.salt.hex() or '-'}"
        )
