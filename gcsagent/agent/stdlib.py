"""Modules of the standard library that are loaded when something of theirs is used for the first time.

asyncio, logging and our own modules import them for what an agent needs late or never: ``inspect`` alone is
1.4 MiB with what it imports. ``import NAME`` then gets a stand-in. It fits modules of which nothing is needed
while others are imported, no base class and no ``from NAME import``: a test holds what is really loaded
against a list.
"""

from __future__ import annotations

import sys
from _thread import RLock
from types import ModuleType
from typing import Any

LATER = (
    "asyncio.sslproto",
    "asyncio.staggered",
    "base64",
    "dataclasses",
    "inspect",
    "secrets",
    "shlex",
    "shutil",
    "tokenize",
    "uuid",
)

NEVER = ("ssl", "_hashlib")
"""Not to be had, as in the guest image: a vsock connection needs no TLS, and hashlib has hashes of its own.
asyncio and hashlib try them and do without, which spares libcrypto: 2.3 MiB."""

_loading = RLock()  # threads use some of these, too


class StandIn(ModuleType):
    """What ``import`` finds instead of the module, and hands on what is asked of it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"{self.__name__} has not been loaded, nor its {name}")
        value = getattr(self._load(), name)
        setattr(self, name, value)
        return value

    def _load(self) -> ModuleType:
        with _loading:
            if sys.modules.get(self.__name__) is self:
                del sys.modules[self.__name__]
                try:
                    __import__(self.__name__)
                except BaseException:
                    sys.modules[self.__name__] = self  # to be tried again
                    raise
            return sys.modules[self.__name__]


def load_later() -> None:
    """To be called before anything has imported one of them."""
    for name in LATER:
        sys.modules.setdefault(name, StandIn(name))
    for name in NEVER:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
