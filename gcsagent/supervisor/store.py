"""The descriptors that must outlive the agent, by name.

Listening sockets, the guest's ends of pipes, pty masters, attached connections, the memory of counters:
an agent that starts again asks for them by the names its predecessor gave them.
"""

from __future__ import annotations

import _thread
import errno
import os
import stat

MAX_NAME = 512
"""Characters: two ids of 128 and what tells a process's descriptors apart."""

MAX_HELD = 65_536
"""More than RLIMIT_NOFILE's usual hard limit would run into; the bound is there so that a broken agent
cannot grow the supervisor's memory for ever."""


class StoreError(ValueError):
    """A name that is taken, unknown or too long, or a full store; ``errno`` is EMFILE for that, else 0."""

    def __init__(self, message: str, errno: int = 0) -> None:
        super().__init__(message)
        self.errno = errno


class FdStore:
    def __init__(self, limit: int = MAX_HELD) -> None:
        """``limit`` leaves room below RLIMIT_NOFILE for what the supervisor itself opens."""
        self._held: dict[str, int] = {}
        self.limit = min(limit, MAX_HELD)

    def __len__(self) -> int:
        return len(self._held)

    def check_new(self, *names: str) -> None:
        """Raises StoreError when something could not be put under each of ``names``, all different."""
        for name in names:
            if not name or len(name) > MAX_NAME:
                raise StoreError(f"a name is 1 to {MAX_NAME} characters")
            if name in self._held:
                raise StoreError(f"{name} is already held")
        if len(self._held) + len(names) > self.limit:
            raise StoreError(
                f"at most {self.limit} descriptors are held, and {len(self._held)} are", errno.EMFILE
            )

    def put(self, name: str, fd: int) -> None:
        """Takes ``fd`` over. Raises StoreError, and leaves it the caller's."""
        self.check_new(name)
        self._held[name] = fd

    def get(self, name: str) -> int:
        fd = self._held.get(name)
        if fd is None:
            raise StoreError(f"nothing is held as {name}")
        return fd

    def release(self, names: list[str]) -> int:
        """Closes what is held under these names; unknown ones are passed over, so that it can be repeated."""
        count = 0
        for name in names:
            fd = self._held.pop(name, None)
            if fd is not None:
                count += 1
                _close(name, fd)
        return count

    def names(self) -> list[str]:
        return list(self._held)

    def items(self) -> list[tuple[str, int]]:
        return list(self._held.items())


_OURS_ALONE = (".r", ".w")
"""Ends of the names of pipes that no container has an end of: the middle ones of streams."""


def _close(name: str, fd: int) -> None:
    """The last descriptor of a pipe's end waits for the pipe's lock, which any process that has the other end
    may keep for as long as it likes (heldup): a thread waits for that one."""
    if not name.endswith(_OURS_ALONE) and stat.S_ISFIFO(os.fstat(fd).st_mode):
        try:
            _thread.start_new_thread(os.close, (fd,))
            return
        except RuntimeError:
            pass  # there is no room for one
    os.close(fd)
