"""Private directories for one VM's sockets and scratch disks, removed with it.

A SIGKILLed launcher cannot clean up, so each directory holds a lock file that its owner keeps locked; the
kernel drops the lock with the owner, and the next launch removes every directory whose lock it can take.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from gcsagent.host.vm.errors import VmError
from gcsagent.host.vm.places import xdg
from gcsagent.host.vm.tools import cache_dir

_PREFIX = "gcs-vm-"
_LOCK = "lock"


class PrivateDirectory:
    """A locked directory, mode 0700. Use `create`; `remove` is idempotent."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def create(cls, parent: Path) -> PrivateDirectory:
        """Makes one in `parent`.

        Raises:
            VmError: the directory cannot be made.
        """
        try:
            parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        except OSError as error:
            raise VmError(f"cannot make a directory for the VM in {parent}: {error}") from error
        made = cls(path, -1)
        try:
            made._lock = os.open(path / f"{_LOCK}.new", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(made._lock, fcntl.LOCK_EX)
            # Named only once locked: a sweep in another process must never find it free.
            os.rename(path / f"{_LOCK}.new", path / _LOCK)
        except OSError as error:
            made.remove()
            raise VmError(f"cannot lock {path}: {error}") from error
        return made

    def remove(self) -> None:
        """Deletes the directory with all that is in it and gives up the lock."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def socket_parent(env: Mapping[str, str] | None = None) -> Path:
    """Where socket directories go. Short, because a UNIX socket's path is limited to 107 bytes (unix(7))."""
    runtime = xdg("XDG_RUNTIME_DIR", env)
    if runtime is not None and len(str(runtime)) < 60 and os.access(runtime, os.W_OK):
        return runtime
    if os.geteuid() == 0:
        return Path("/run")
    return Path(tempfile.gettempdir())


def scratch_parent(env: Mapping[str, str] | None = None) -> Path:
    """Where disk images made for one VM go: on disk rather than /run, they may be large."""
    return cache_dir(env) / "scratch"


def sweep(parent: Path) -> None:
    """Removes the directories in `parent` whose owners have died."""
    for path in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            _remove_if_abandoned(path)


def _remove_if_abandoned(path: Path) -> None:
    # A directory without its lock file is being made or removed right now, by somebody alive.
    lock = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(lock)
