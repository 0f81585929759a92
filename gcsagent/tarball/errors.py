"""What can be wrong with an archive or with where it is to go."""

from __future__ import annotations

import errno

from protocol.errors import Code

_CODES = {
    errno.ENOENT: Code.NOT_FOUND,
    errno.EPERM: Code.PERMISSION_DENIED,
    errno.EACCES: Code.PERMISSION_DENIED,
    errno.EROFS: Code.PERMISSION_DENIED,
    errno.ENOTDIR: Code.FAILED_PRECONDITION,
    errno.EISDIR: Code.FAILED_PRECONDITION,
    errno.EEXIST: Code.FAILED_PRECONDITION,
    errno.ENOTEMPTY: Code.FAILED_PRECONDITION,
    errno.EBUSY: Code.FAILED_PRECONDITION,
    errno.ETXTBSY: Code.FAILED_PRECONDITION,
    errno.ELOOP: Code.FAILED_PRECONDITION,
    errno.ENAMETOOLONG: Code.INVALID_ARGUMENT,
    errno.ENOSPC: Code.RESOURCE_EXHAUSTED,
    errno.EDQUOT: Code.RESOURCE_EXHAUSTED,
    errno.EFBIG: Code.RESOURCE_EXHAUSTED,
    errno.EMFILE: Code.RESOURCE_EXHAUSTED,
    errno.ENFILE: Code.RESOURCE_EXHAUSTED,
    errno.ENOMEM: Code.RESOURCE_EXHAUSTED,
}


class ArchiveError(Exception):
    """``code`` says whose fault it is; ``errno`` is the kernel's reason, or 0."""

    def __init__(self, code: Code, message: str, number: int = 0, field: str = "") -> None:
        super().__init__(message)
        self.code, self.message, self.errno, self.field = code, message, number, field


def damaged(message: str) -> ArchiveError:
    return ArchiveError(Code.INVALID_ARGUMENT, f"the archive: {message}")


def shown(name: str) -> str:
    """A file name as text that can be sent and printed, however it is made up."""
    return repr(name.encode("utf-8", "backslashreplace").decode()[:200])


def at(name: str, error: OSError) -> ArchiveError:
    """What the kernel said about ``name``."""
    number = error.errno or 0
    return ArchiveError(
        _CODES.get(number, Code.INTERNAL), f"{shown(name)}: {error.strerror or error}", number
    )
