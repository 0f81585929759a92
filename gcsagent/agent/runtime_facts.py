"""What ``agent.info`` says of the runtimes: asked once per binary, and again when that is another one."""

from __future__ import annotations

import asyncio
import os
import shutil
from typing import Any

from gcsagent.agent.runtime import Runtime, RuntimeFailure
from gcsagent.agent.runtimes import Runtimes
from protocol.types import RuntimeInfo

_Identity = tuple[str, int, int, int]


class RuntimeFacts:
    def __init__(self, runtimes: Runtimes) -> None:
        self._runtimes = runtimes
        self._versions: dict[_Identity, str] = {}
        self._features: dict[_Identity, dict[str, Any]] = {}
        self._asking: dict[str, asyncio.Lock] = {}  # a crowd that wants to know starts one program, not many

    async def all(self, features: bool) -> tuple[RuntimeInfo, ...]:
        """Of every runtime that is offered, the default first."""
        asked = (self._about(runtime, features) for runtime in self._runtimes.offered)
        return tuple(await asyncio.gather(*asked))

    async def _about(self, runtime: Runtime, features: bool) -> RuntimeInfo:
        identity = _identity(runtime.binary)
        if identity is None:
            return RuntimeInfo(runtime.name, runtime.binary, "not installed")
        try:
            async with self._asking.setdefault(runtime.binary, asyncio.Lock()):
                if identity not in self._versions:
                    self._versions[identity] = await runtime.version()
                if features and identity not in self._features:
                    self._features[identity] = await runtime.features()
        except RuntimeFailure as error:
            return RuntimeInfo(runtime.name, identity[0], str(error))
        found = self._features[identity] if features else {}
        return RuntimeInfo(runtime.name, identity[0], self._versions[identity], found)


def _identity(binary: str) -> _Identity | None:
    """The file on PATH and what changes when it is replaced; None when there is none."""
    path = shutil.which(binary)
    if path is None:
        return None
    try:
        found = os.stat(path)
    except OSError:
        return None
    return path, found.st_ino, found.st_size, found.st_mtime_ns
