"""What all connections share of the agent's limits, and the one error of whoever reaches one.

:class:`protocol.limits.Limits` says what the limits are, ``gcs.max_...`` (gcsagent.common.config) what they
are on this agent. Each is checked before anything is made.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from protocol.dataclass import names_of
from protocol.errors import Code, RpcError
from protocol.limits import DEFAULT_SPOOL, Limits
from protocol.types import Stdio, StreamMode, WhenFull

if TYPE_CHECKING:
    from gcsagent.agent.container import Container

ALWAYS = 8
"""Requests in flight that a connection may have however many others there are."""

_KNOWN = frozenset(names_of(Limits))


def limits_of(settings: Iterable[tuple[str, int]]) -> Limits:
    """The defaults, some of which follow the machine, and what was set.

    What a supervisor of another version has set is passed over.
    """
    known = {name: value for name, value in settings if name in _KNOWN}
    each = known.setdefault("max_runtime_calls", calls_by_cpus())
    known.setdefault("max_runtime_calls_total", 2 * each)
    return Limits(**known)


def calls_by_cpus() -> int:
    """A runtime call is half computing, half waiting for the kernel."""
    return 2 * len(os.sched_getaffinity(0)) + 2


class Bounds:
    """The limits, and the counts that are nobody's own: requests in flight, bytes of unfinished messages,
    connections that have said hello."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.in_flight = self.unfinished = self.sessions = 0

    def check_request(self, outstanding: int) -> None:
        """Whether one more may begin on a connection that has ``outstanding``. Raises RESOURCE_EXHAUSTED."""
        limits = self.limits
        if outstanding >= limits.max_in_flight:
            raise self.exhausted(
                "max_in_flight", "requests are in flight on this connection: wait for answers"
            )
        if self.in_flight >= limits.max_in_flight_total and outstanding >= ALWAYS:
            raise self.exhausted("max_in_flight_total", "requests are in flight: wait for answers")

    def check_create(self, stdio: Stdio, containers: Collection[Container]) -> None:
        """Whether one more container may be made beside these. Raises RESOURCE_EXHAUSTED."""
        if len(containers) >= self.limits.max_containers:
            raise self.exhausted("max_containers", "containers exist: delete what has ended")
        self._check_spools(stdio, containers)

    def check_exec(self, stdio: Stdio, container: Container, containers: Collection[Container]) -> None:
        """Whether one more process may be made in ``container``. Raises RESOURCE_EXHAUSTED."""
        if container.exec_count >= self.limits.max_execs:
            raise self.exhausted(
                "max_execs", f"processes have been executed in {container.ident}: delete what has ended"
            )
        if sum(each.exec_count for each in containers) >= self.limits.max_execs_total:
            raise self.exhausted("max_execs_total", "executed processes exist: delete what has ended")
        self._check_spools(stdio, containers)

    def _check_spools(self, stdio: Stdio, containers: Collection[Container]) -> None:
        wanted = _spooled(stdio)
        if not any(wanted):
            return
        taken = [_spooled(process.stdio) for each in containers for process in each.processes.values()]
        for index, name in enumerate(("max_spool_bytes", "max_log_bytes")):
            if wanted[index] and sum(each[index] for each in taken) + wanted[index] > getattr(
                self.limits, name
            ):
                raise self.exhausted(
                    name, "bytes are all that spools may keep together: ask for less or delete some"
                )

    def exhausted(self, name: str, what: str) -> RpcError:
        value = getattr(self.limits, name)
        return RpcError(Code.RESOURCE_EXHAUSTED, f"{value} {what} ({name})", limit=name, value=value)


def _spooled(stdio: Stdio) -> tuple[int, int]:
    """Bytes that the spools of one process may keep: those that block, those that are logs."""
    block = log = 0
    for stream in (stdio.stdout, stdio.stderr):
        if stream.mode is StreamMode.SPOOL:
            if stream.when_full is WhenFull.DROP_OLDEST:
                log += stream.limit or DEFAULT_SPOOL
            else:
                block += stream.limit or DEFAULT_SPOOL
    return block, log
