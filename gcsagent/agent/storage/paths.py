"""Where things are mounted: reached step by step, by directories only, so that no symlink leads elsewhere.

What is mounted where is given to mount(8) as ``/proc/self/fd/N``: somebody who can write to a directory on
the way, such as a container it is shared with, cannot put a symlink there in between.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator

from protocol.errors import Code, RpcError

_WALK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC

_OURS = ("/proc", "/sys", "/dev")
"""Nothing is mounted there: the agent and every runtime need them as they are."""


def check_target(target: str, state: str, mounts: str, field: str = "target") -> None:
    """Raises INVALID_ARGUMENT for a place where a mount would take something from under the agent."""
    for place in (*_OURS, state):
        above, inside = _inside(place, target), _inside(target, place)
        if above or (inside and not (place == state and _inside(target, mounts) and target != mounts)):
            raise RpcError(
                Code.INVALID_ARGUMENT,
                f"{field}: {target} is, holds or lies in {place}, which the agent needs as it is",
                field=field,
            )


def _inside(path: str, top: str) -> bool:
    return path == top or path.startswith(f"{top}/")


@contextlib.contextmanager
def opened(path: str, field: str) -> Iterator[int]:
    """An O_PATH descriptor of what is there now, on top of all mounts. Raises RpcError."""
    fd = _walk(path, field)
    try:
        yield fd
    finally:
        os.close(fd)


def missing(path: str, field: str) -> list[str]:
    """Which of its directories are not there, the outermost first. Raises RpcError."""
    parts = path[1:].split("/")
    for count in range(len(parts), 0, -1):
        here = "/" + "/".join(parts[:count])
        try:
            os.close(_walk(here, field))
        except RpcError as error:
            if error.code is not Code.NOT_FOUND:
                raise
            continue
        return ["/" + "/".join(parts[: known + 1]) for known in range(count, len(parts))]
    return ["/" + "/".join(parts[: known + 1]) for known in range(len(parts))]


def make(paths: list[str], field: str, *, file: bool) -> None:
    """Makes what :func:`missing` gave; the last one as a file with ``file``. Raises RpcError, OSError."""
    for path in paths:
        parent, name = os.path.split(path)
        directory = _walk(parent, field) if parent != "/" else os.open("/", _WALK)
        try:
            if file and path == paths[-1]:
                os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644, dir_fd=directory))
            else:
                os.mkdir(name, 0o755, dir_fd=directory)
        except FileExistsError:
            pass  # somebody else wanted it, too
        finally:
            os.close(directory)


def remove(paths: list[str]) -> None:
    """Takes back what :func:`make` made, as far as it is empty still."""
    for path in reversed(paths):
        with contextlib.suppress(OSError):
            info = os.lstat(path)
            if stat.S_ISDIR(info.st_mode):
                os.rmdir(path)
            elif stat.S_ISREG(info.st_mode) and info.st_size == 0:
                os.unlink(path)


def _walk(path: str, field: str) -> int:
    """Raises NOT_FOUND, and PERMISSION_DENIED for a way that is not by directories only."""
    fd = os.open("/", _WALK)
    parts = path[1:].split("/")
    for number, part in enumerate(parts, 1):
        here = "/" + "/".join(parts[:number])
        try:
            following = os.open(part, _WALK, dir_fd=fd)
        except OSError as error:
            raise _refusal(here, error, field) from error
        finally:
            os.close(fd)
        fd = following
        if stat.S_ISLNK(os.fstat(fd).st_mode):
            os.close(fd)
            raise RpcError(
                Code.PERMISSION_DENIED,
                f"{field}: {here} is a symlink; give the path it leads to",
                field=field,
            )
    return fd


def _refusal(here: str, error: OSError, field: str) -> RpcError:
    if error.errno == errno.ENOENT:
        return RpcError(Code.NOT_FOUND, f"{field}: there is no {here} in the guest", field=field)
    if error.errno == errno.ENOTDIR:
        return RpcError(Code.INVALID_ARGUMENT, f"{field}: {here} is not below a directory", field=field)
    return RpcError(Code.INTERNAL, f"{field}: {here}: {error.strerror}", field=field, errno=error.errno or 0)
