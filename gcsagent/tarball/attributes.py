"""Owner, mode, times and extended attributes: between a file and a member of an archive.

In pax headers as star, GNU tar and bsdtar write them: ``SCHILY.xattr.NAME``, and times to the nanosecond.
Ids are numbers; the names of users and groups that an archive may hold belong to another machine.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass

from gcsagent.tarball.errors import damaged, shown

XATTR = "SCHILY.xattr."
MAX_ID = (1 << 32) - 2
"""The largest user or group id; the next is no one's (chown(2) takes it for "as it is")."""

_TIME = re.compile(r"(-?)([0-9]{1,12})(?:\.([0-9]+))?\Z")

_LOST = (errno.ENOTSUP, errno.EPERM, errno.ENODATA, errno.EINVAL, errno.ERANGE, errno.E2BIG)
"""What a file system says that does not have such an attribute, or not this one."""

IdMap = Sequence[tuple[int, int, int]]
"""(id inside, id outside, how many), as in user_namespaces(7); empty: they are the same."""


@dataclass(frozen=True, slots=True)
class Keep:
    """What of an archive's attributes a file is given. ``xattrs`` are prefixes of names."""

    owner: bool = True
    setid: bool = True
    xattrs: tuple[str, ...] = ("user.", "trusted.", "security.", "system.posix_acl_")
    uids: IdMap = ()
    gids: IdMap = ()


NEVER = ("trusted.overlay.", "security.ima", "security.evm")
"""Overlay's own notes, and signatures made by another machine's kernel."""


def outside(number: int, ids: IdMap, name: str) -> int:
    """The id that ``number`` has out here. Raises ArchiveError."""
    if not 0 <= number <= MAX_ID:
        raise damaged(f"{shown(name)} belongs to {number}, which is no id")
    if not ids:
        return number
    for inside, out, count in ids:
        if inside <= number < inside + count:
            return out + number - inside
    raise damaged(f"{shown(name)} belongs to {number}, which the container's mappings do not have")


def inside(number: int, ids: IdMap) -> int:
    """The id that ``number`` has in there; the overflow id where it has none, as the kernel shows it."""
    if not ids:
        return number
    for inner, out, count in ids:
        if out <= number < out + count:
            return inner + number - out
    return 65534


def mtime_of(member: tarfile.TarInfo) -> int:
    """In nanoseconds since the epoch; 0 for what is no time."""
    match = _TIME.match(member.pax_headers.get("mtime", "") or str(int(_finite(member.mtime))))
    if match is None:
        return 0
    sign, whole, fraction = match.groups()
    value = int(whole) * 10**9 + int((fraction or "")[:9].ljust(9, "0"))
    return -value if sign else value


def _finite(value: float) -> float:
    return value if abs(value) < 1e12 else 0.0


def mode_of(member: tarfile.TarInfo, keep: Keep) -> int:
    return member.mode & (0o7777 if keep.setid else 0o777)


def give(fd: int, member: tarfile.TarInfo, keep: Keep) -> int:
    """Makes the file or directory behind ``fd`` what ``member`` says; returns how many attributes were lost.

    The order matters: a change of owner takes set-id bits and capabilities away.
    """
    if keep.owner:
        os.fchown(
            fd, outside(member.uid, keep.uids, member.name), outside(member.gid, keep.gids, member.name)
        )
    os.fchmod(fd, mode_of(member, keep))
    lost = give_xattrs(fd, member, keep)
    set_mtime(fd, member)
    return lost


def give_named(directory: int, name: str, member: tarfile.TarInfo, keep: Keep) -> int:
    """Likewise for what cannot be opened: symlinks, devices. Never follows one."""
    if keep.owner:
        uid, gid = outside(member.uid, keep.uids, member.name), outside(member.gid, keep.gids, member.name)
        os.chown(name, uid, gid, dir_fd=directory, follow_symlinks=False)
    lost = give_xattrs(f"/proc/self/fd/{directory}/{name}", member, keep)
    when = mtime_of(member)
    with contextlib.suppress(OverflowError):
        os.utime(name, ns=(when, when), dir_fd=directory, follow_symlinks=False)
    return lost


def set_mtime(fd: int, member: tarfile.TarInfo) -> None:
    when = mtime_of(member)
    with contextlib.suppress(OverflowError):
        os.utime(fd, ns=(when, when))


def give_xattrs(target: int | str, member: tarfile.TarInfo, keep: Keep) -> int:
    lost = 0
    for key, value in member.pax_headers.items():
        if not key.startswith(XATTR):
            continue
        name = key[len(XATTR) :]
        if not name.startswith(keep.xattrs) or name.startswith(NEVER) or "\0" in name:
            lost += 1
            continue
        data = value.encode("utf-8", "surrogateescape")
        try:
            if isinstance(target, int):
                os.setxattr(target, name, data)
            else:
                os.setxattr(target, name, data, follow_symlinks=False)
        except OSError as error:
            if error.errno not in _LOST:
                raise
            lost += 1
    return lost


def describe(member: tarfile.TarInfo, info: os.stat_result, uids: IdMap, gids: IdMap) -> None:
    """Writes down what stat(2) said."""
    member.mode = stat.S_IMODE(info.st_mode)
    member.uid, member.gid = inside(info.st_uid, uids), inside(info.st_gid, gids)
    seconds, nanoseconds = divmod(info.st_mtime_ns, 10**9)
    member.mtime = max(0, seconds)
    if seconds < 0:
        whole, part = divmod(-info.st_mtime_ns, 10**9)
        note(member, "mtime", f"-{whole}.{part:09}")
    elif nanoseconds:
        note(member, "mtime", f"{seconds}.{nanoseconds:09}")


def note(member: tarfile.TarInfo, key: str, value: str) -> None:
    """A record of its pax header."""
    member.pax_headers = {**member.pax_headers, key: value}


def describe_xattrs(member: tarfile.TarInfo, target: int | str) -> None:
    """Writes down the extended attributes of ``target``; a symlink's own, by name. Raises OSError."""
    follow = isinstance(target, int)
    try:
        names = os.listxattr(target, follow_symlinks=follow)
    except OSError as error:
        if error.errno in _LOST:
            return
        raise
    for name in sorted(names):
        if name.startswith(NEVER):
            continue
        with contextlib.suppress(OSError):  # it may be gone again
            value = os.getxattr(target, name, follow_symlinks=follow)
            note(member, XATTR + name, value.decode("utf-8", "surrogateescape"))
