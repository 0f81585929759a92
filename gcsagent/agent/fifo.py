"""Streams that are named pipes in the guest: the process has one end, a peer opens the other by its path.

No byte passes the agent. It opens the ends, gives the process its own, and has the supervisor hold the one
that keeps the pipe as it should be while no peer is there:

* stdout and stderr are open for reading and writing in the process, so that it is never without a reader,
  and held open for reading until the process is deleted: what was written waits for a late peer. A peer that
  reads finds the end of file when the process, and whoever inherited the pipe from it, is gone;
* stdin is open for reading in the process, and held open for writing until ``process.close_stdin`` or the
  process's end: a peer that goes away does not end it.

A fifo that is not there is made, and removed with the last process that uses it; one that was there never
is. So that this holds wherever the agent is killed, a fifo is made under a name that follows from its
user's, its inode is written down, and only then is it linked to the name that was asked for.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Callable

from gcsagent.agent.attachable import Keeper
from gcsagent.agent.unattachable import Unattachable
from protocol.dataclass import dataclass
from protocol.errors import Code, RpcError
from protocol.types import Stdio, StreamMode, StreamState

_ATTEMPTS = 3
"""Somebody else may make or remove it between two looks; more often, and he is at war with us."""


@dataclass(frozen=True, slots=True)
class Fifo:
    """``device`` and ``inode`` are 0 for one that is not ours to remove."""

    path: str
    device: int = 0
    inode: int = 0

    @property
    def made(self) -> bool:
        return self.inode != 0

    def same_file(self, found: os.stat_result) -> bool:
        return (self.device, self.inode) == (found.st_dev, found.st_ino)


class FifoStream(Unattachable):
    """``fd`` is what is held, under ``name``; -1 before it is opened, and after it was let go."""

    def __init__(self, keeper: Keeper, name: str, path: str, *, is_input: bool, fd: int = -1) -> None:
        self._keeper, self._name, self._path, self._is_input = keeper, name, path, is_input
        self._fd = fd
        self._over = False
        self.refusal = f"this stream is a fifo: open {path} in the guest instead"

    def opened(self, fd: int) -> None:
        self._fd = fd

    def close_input(self, offset: int | None) -> None:
        if not self._is_input:
            raise RpcError(Code.INVALID_ARGUMENT, "this stream is an output")
        if offset is not None:
            raise RpcError(
                Code.INVALID_ARGUMENT,
                "offset: nobody counts a fifo's bytes; leave it out, the peer's own are read first anyway",
                field="offset",
            )
        self._drop()

    def state(self) -> StreamState:
        ended = self._over or (self._is_input and self._fd < 0)
        return StreamState(StreamMode.FIFO, ended=ended, path=self._path)

    def produced(self) -> int | None:
        return None

    def process_ended(self) -> None:
        self._over = True
        if self._is_input:
            self._drop()  # a peer that writes is to find out

    def close(self) -> None:
        self._drop()

    def _drop(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._keeper.supervisor.release(self._name)


def wanted(stdio: Stdio) -> dict[str, Fifo]:
    """The fifos that are asked for, by stream name."""
    specs = {"stdin": stdio.stdin, "stdout": stdio.stdout, "stderr": stdio.stderr}
    return {name: Fifo(spec.path or "") for name, spec in specs.items() if spec.mode is StreamMode.FIFO}


@dataclass(frozen=True, slots=True)
class Ends:
    """``child`` is the process's, ``hold`` the supervisor's; -1 for none."""

    child: int
    hold: int


def open_ends(path_fd: int, name: str) -> Ends:
    """Opens the fifo behind ``path_fd``, of O_PATH, as the stream ``name`` wants it. Raises OSError.

    Opening one for reading and writing never waits for a peer, and while it is open so, opening it one way
    does not either (fifo(7)). O_NONBLOCK would be the process's, too: it is in the open file description.
    """
    path = f"/proc/self/fd/{path_fd}"
    both = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    hold = -1
    try:
        if name == "stdin":
            hold = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            return Ends(os.open(path, os.O_RDONLY | os.O_CLOEXEC), hold)
        if name in ("stdout", "stderr"):
            hold = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        child, both = both, -1
        return Ends(child, hold)
    except OSError:
        if hold >= 0:
            os.close(hold)
        raise
    finally:
        if both >= 0:
            os.close(both)


def claim(
    field: str,
    path: str,
    temporary: str,
    ours: Callable[[os.stat_result], bool],
    record: Callable[[Fifo], None],
) -> int:
    """The fifo at ``path``, made if nothing is there, as a descriptor of O_PATH.

    ``record`` writes down whether it is to be removed one day: one that was made here, or is ``ours`` by
    another process's record. Raises INVALID_ARGUMENT, NOT_FOUND or FAILED_PRECONDITION naming ``field``, and
    what ``record`` raises.
    """
    made = Fifo(path)

    def remember(fifo: Fifo) -> None:
        nonlocal made
        made = fifo
        record(fifo)

    for _ in range(_ATTEMPTS):
        fd = _find(field, path)
        if fd < 0:
            _make(field, path, temporary, remember)
            continue
        try:
            found = os.fstat(fd)
            if not made.same_file(found):
                remember(Fifo(path, found.st_dev, found.st_ino) if ours(found) else Fifo(path))
        except BaseException:
            os.close(fd)
            raise
        return fd
    raise RpcError(Code.FAILED_PRECONDITION, f"{field}: {path} comes and goes", field=field)


def temporary_name(path: str, owner: str) -> str:
    """What a fifo is called before it is ``path``; ``owner`` is unique among all agents of the machine."""
    digest = hashlib.sha256(f"{owner}\0{path}".encode()).hexdigest()[:24]
    return os.path.join(os.path.dirname(path), f".gcs-{digest}")


def remove(fifo: Fifo, temporary: str) -> None:
    """Removes what was made: the fifo itself, unless something else has its name by now. Raises OSError."""
    _unlink(temporary)
    if not fifo.made:
        return
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if fifo.same_file(os.lstat(fifo.path)):
            _unlink(fifo.path)


def _find(field: str, path: str) -> int:
    """An existing fifo; -1 when nothing is there."""
    try:
        fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return -1
    except OSError as error:
        raise _refusal(field, path, error) from error
    mode = os.fstat(fd).st_mode
    if stat.S_ISFIFO(mode):
        return fd
    os.close(fd)
    what = "a symbolic link" if stat.S_ISLNK(mode) else "no fifo"
    raise RpcError(Code.INVALID_ARGUMENT, f"{field}: {path} is {what}", field=field)


def _make(field: str, path: str, temporary: str, record: Callable[[Fifo], None]) -> None:
    try:
        _unlink(temporary)
        os.mkfifo(temporary, 0o600)
        made = os.lstat(temporary)
    except OSError as error:
        raise _refusal(field, path, error) from error
    try:
        record(Fifo(path, made.st_dev, made.st_ino))
        os.link(temporary, path, follow_symlinks=False)
    except FileExistsError:
        record(Fifo(path))  # somebody was faster: it is his
    except OSError as error:
        raise _refusal(field, path, error) from error
    finally:
        _unlink(temporary)


def _refusal(field: str, path: str, error: OSError) -> RpcError:
    if error.errno == errno.ENOENT:
        message = f"{field}: the directory of {path} does not exist in the guest"
        return RpcError(Code.NOT_FOUND, message, field=field)
    wrong = error.errno in (errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL)
    code = Code.INVALID_ARGUMENT if wrong else Code.FAILED_PRECONDITION
    return RpcError(code, f"{field}: {path}: {error.strerror}", field=field, errno=error.errno)


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.unlink(path)
