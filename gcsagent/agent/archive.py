"""Unpacks code for an upgrade, a tar or tar.gz of ``gcsagent/`` and ``protocol/``, believing nothing of it.

Stricter than tarfile's ``data`` filter, which the oldest supported Python (3.11.2 in Debian 12) lacks: only
plain files and directories, only below the two packages, each file once, everything bounded before it is
written.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
import zlib

PACKAGES = ("gcsagent", "protocol")
MAX_FILES, MAX_BYTES = 4096, 64 << 20
"""Files and bytes once unpacked; the agent itself is about 60 files and half a megabyte."""

_CHUNK = 1 << 16


class ArchiveError(Exception):
    """An archive that cannot be used; the message says what about it."""


def digest(path: str) -> str:
    """Its SHA-256, in hex. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unpack(archive: str, target: str) -> None:
    """Makes the directory ``target`` with what ``archive`` holds; after an error there is none.

    Raises ArchiveError or OSError.
    """
    temporary = f"{target}.new"
    shutil.rmtree(temporary, ignore_errors=True)
    os.mkdir(temporary, mode=0o700)
    try:
        with open(archive, "rb") as file:
            compressed = file.read(2) == b"\x1f\x8b"
        try:
            with tarfile.open(archive, "r:gz") if compressed else tarfile.open(archive, "r:") as tar:
                _extract(tar, temporary)
        except (tarfile.TarError, EOFError, zlib.error, ValueError) as error:
            raise ArchiveError(f"not a whole tar or tar.gz: {error}") from error
        for package in PACKAGES:
            if not os.path.isfile(os.path.join(temporary, package, "__init__.py")):
                raise ArchiveError(f"there is no {package}/__init__.py in it")
        os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _extract(tar: tarfile.TarFile, target: str) -> None:
    files = total = 0
    for member in tar:
        parts = [part for part in member.name.split("/") if part not in ("", ".")]
        if not member.name.startswith("/") and not parts and member.isdir():
            continue  # "./", the archive's own root
        if member.name.startswith("/") or ".." in parts or not parts or parts[0] not in PACKAGES:
            raise ArchiveError(f"{member.name[:200]!r} is not below {' or '.join(PACKAGES)}")
        if not (member.isdir() or member.isreg()):
            raise ArchiveError(f"{member.name[:200]!r} is neither a plain file nor a directory")
        files, total = files + 1, total + member.size
        if files > MAX_FILES or total > MAX_BYTES:
            raise ArchiveError(f"more than {MAX_FILES} files or {MAX_BYTES} bytes")
        path = os.path.join(target, *parts)
        try:
            os.makedirs(path if member.isdir() else os.path.dirname(path), mode=0o700, exist_ok=True)
            if member.isreg():
                _write(tar, member, path)
        except (FileExistsError, NotADirectoryError) as error:
            raise ArchiveError(f"{member.name[:200]!r} is in it twice, or below a file") from error


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> None:
    source = tar.extractfile(member)
    assert source is not None  # only links and the like have none
    with source, open(path, "xb") as file:
        shutil.copyfileobj(source, file, _CHUNK)
        if file.tell() != member.size:
            raise ArchiveError(f"{member.name[:200]!r} is cut off")
