"""guest.watch_pressure: the kernel says when processes wait too long for memory, a CPU or a disk.

A watch is a descriptor (accounting/psi.rst: a threshold written to a pressure file, which is then ready with
EPOLLPRI). The supervisor holds it under a name that says all about it, so that a successor of this agent
goes on with it, and with what happened in between: the kernel keeps that until the descriptor is polled.
A watch of a container ends with the container's cgroup.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterable
from typing import Any

from gcsagent.agent.events import EventLog
from gcsagent.agent.guest.trigger import Trigger
from gcsagent.agent.supervisor_client import SupervisorClient
from protocol.errors import Code, RpcError
from protocol.families.guest import PressureKind, PressureResource, WatchPressure

_log = logging.getLogger("agent.guest.pressure")

MACHINE = "/proc/pressure"
MOST = 64
PREFIX = "pressure/"


class PressureWatches:
    def __init__(self, supervisor: SupervisorClient, events: EventLog) -> None:
        self._supervisor, self._events = supervisor, events
        self._watches: dict[str, tuple[WatchPressure, Trigger]] = {}

    def wanted(self) -> tuple[WatchPressure, ...]:
        return tuple(watch for watch, _ in self._watches.values())

    def begin(self, wanted: WatchPressure, path: str) -> None:
        """Watches the pressure file ``path``; nothing to do for the same watch again. Raises RpcError."""
        there = self._watches.get(wanted.watch)
        if there is not None:
            if there[0] != wanted:
                raise RpcError(
                    Code.ALREADY_EXISTS,
                    f"there is another watch {wanted.watch!r}: end that or take another id",
                )
            return
        if len(self._watches) >= MOST:
            raise RpcError(Code.RESOURCE_EXHAUSTED, f"there are {MOST} watches already: end one first")
        fd = _open(wanted, path)
        self._supervisor.hold(_name(wanted), fd)
        self._watch(wanted, fd)

    def end(self, ident: str) -> None:
        """Raises NOT_FOUND."""
        if ident not in self._watches:
            raise RpcError(Code.NOT_FOUND, f"there is no watch {ident}")
        wanted, trigger = self._watches.pop(ident)
        trigger.close()
        self._supervisor.release(_name(wanted))

    async def take_up(self, held: Iterable[str]) -> None:
        """Goes on with an earlier agent's watches; ``held`` is all the supervisor holds."""
        for name in held:
            if not name.startswith(PREFIX):
                continue
            wanted = _parse(name)
            if wanted is None:
                self._supervisor.release(name)  # of an agent that knew more
                continue
            [fd] = await self._supervisor.fetch([name])
            self._watch(wanted, fd)

    def _watch(self, wanted: WatchPressure, fd: int) -> None:
        ident = wanted.watch
        trigger = Trigger(fd, lambda: self._tell(ident), lambda: self._gone(ident))
        self._watches[ident] = wanted, trigger

    def _gone(self, ident: str) -> None:
        _log.info("a watch ended with its container", extra={"watch": ident})
        self.end(ident)

    def _tell(self, ident: str) -> None:
        wanted, trigger = self._watches[ident]
        data: dict[str, Any] = {"watch": ident, "kind": wanted.kind.value}
        data |= _numbers(trigger.read())
        self._events.publish(f"{wanted.resource.value}.pressure", wanted.container or "", **data)


def _open(wanted: WatchPressure, path: str) -> int:
    """A descriptor that the kernel makes ready. Raises RpcError."""
    line = f"{wanted.kind.value} {wanted.stall_us} {wanted.window_us}"
    try:
        fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise RpcError(
            Code.UNIMPLEMENTED, f"this kernel has no {path}: it needs PSI and cgroup v2"
        ) from error
    try:
        os.write(fd, line.encode() + b"\0")
    except OSError as error:
        os.close(fd)
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        raise RpcError(
            Code.INVALID_ARGUMENT,
            f"the kernel does not take {line!r}: stall_us may be window_us at most, and window_us must be"
            " a multiple of 2 s without CAP_SYS_RESOURCE",
            field="window_us",
            errno=error.errno,
        ) from error
    return fd


def _numbers(text: str) -> dict[str, float | int]:
    """``some_avg10`` to ``full_total_us``, as far as the kernel gives them."""
    found: dict[str, float | int] = {}
    for line in text.splitlines():
        kind, *pairs = line.split()
        for name, _, value in (pair.partition("=") for pair in pairs):
            found[f"{kind}_{name}" + ("_us" if name == "total" else "")] = (
                int(value) if name == "total" else float(value)
            )
    return found


def _name(wanted: WatchPressure) -> str:
    """Ids have no slash."""
    parts = (wanted.watch, wanted.resource.value, wanted.kind.value, wanted.stall_us, wanted.window_us)
    return PREFIX + "/".join(map(str, (*parts, wanted.container or "")))


def _parse(name: str) -> WatchPressure | None:
    try:
        watch, resource, kind, stall, window, container = name.removeprefix(PREFIX).split("/")
        return WatchPressure(
            watch,
            PressureResource(resource),
            PressureKind(kind),
            int(stall),
            int(window),
            container or None,
        )
    except ValueError:
        return None
