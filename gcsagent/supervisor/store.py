"""The descriptors that must outlive the agent, by name.

Listening sockets, the guest's ends of pipes, pty masters, attached connections, the memory of counters:
an agent that starts again asks for them by the names its predecessor gave them.
"""

from __future__ import annotations

import os

MAX_NAME = 256
MAX_HELD = 65_536
"""More than RLIMIT_NOFILE's usual hard limit would run into; the bound is there so that a broken agent
cannot grow the supervisor's memory for ever."""


class StoreError(ValueError):
    """A name that is taken, unknown or too long, or a full store."""


class FdStore:
    def __init__(self) -> None:
        self._held: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._held)

    def check_new(self, name: str) -> None:
        """Raises StoreError when nothing could be put under ``name``."""
        if not name or len(name) > MAX_NAME:
            raise StoreError(f"a name is 1 to {MAX_NAME} characters")
        if name in self._held:
            raise StoreError(f"{name} is already held")
        if len(self._held) >= MAX_HELD:
            raise StoreError(f"{MAX_HELD} descriptors are held already")

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
        fds = [fd for name in names if (fd := self._held.pop(name, None)) is not None]
        for fd in fds:
            os.close(fd)
        return len(fds)

    def names(self) -> list[str]:
        return list(self._held)
