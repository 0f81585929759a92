"""The OCI runtimes an agent has: which a container gets, and which it got from an earlier agent."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

from gcsagent.agent.runtime import Runtime
from protocol.errors import Code, RpcError


class Runtimes:
    def __init__(self, make: Callable[[str], Runtime], binaries: Sequence[str]) -> None:
        """``binaries`` are what new containers may ask for, names or paths, the default first."""
        self._make = make
        self.offered = tuple(make(binary) for binary in binaries)
        self._known = {runtime.name: runtime for runtime in self.offered}

    @property
    def default(self) -> Runtime:
        return self.offered[0]

    def __iter__(self) -> Iterator[Runtime]:
        """Every one that a container has, offered to new ones or not."""
        return iter(self._known.values())

    def choose(self, name: str) -> Runtime:
        """The one a new container asks for; empty is the default. Raises INVALID_ARGUMENT."""
        if not name:
            return self.default
        for runtime in self.offered:
            if runtime.name == name:
                return runtime
        there = ", ".join(runtime.name for runtime in self.offered)
        raise RpcError(
            Code.INVALID_ARGUMENT,
            f"runtime: {name!r} is none of this agent's, which are: {there} (gcs.runtimes= allows others)",
            field="runtime",
        )

    def remembered(self, binary: str) -> Runtime:
        """The one a container was made with, also when new containers may not have it any more."""
        name = os.path.basename(binary)
        if name not in self._known:
            self._known[name] = self._make(binary)
        return self._known[name]
