"""container.kill, and what a signal may be called."""

from __future__ import annotations

import contextlib
import re
import signal
from collections.abc import Iterator

from gcsagent.agent import reach
from gcsagent.agent.call import Call
from gcsagent.agent.container import Container
from gcsagent.agent.registry import Registry
from protocol.errors import Code, RpcError
from protocol.families.container import KillContainer
from protocol.method import Empty
from protocol.types import Status

_REAL_TIME = re.compile(r"(SIGRTMIN\+|SIGRTMAX-)(\d{1,2})", re.ASCII)


class SignalService:
    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def kill(self, params: KillContainer, call: Call) -> Empty:
        number = signal_number(params.signal)
        with once(call):
            await self._signal(params, number, call)
        call.commit()
        return Empty()

    async def _signal(self, params: KillContainer, number: int, call: Call) -> None:
        container = self._registry.get(params.container)
        container.check("kill")
        self._registry.journal.begun(call.mark)
        if params.all:
            await self._signal_all(container, number)
        else:
            container.init.signal(number)
        if number == signal.SIGKILL and container.status is Status.PAUSED:
            container.cgroup.thaw()  # with cgroup v1 a frozen process does not die before that

    async def _signal_all(self, container: Container, number: int) -> None:
        async with container.changing:  # not while it is being paused or resumed
            container.check("kill")
            if number == signal.SIGKILL:
                for process in container.processes.values():
                    process.killed = True
            if not await reach.signal_everybody(container.cgroup, number, self._registry.oom.files):
                raise RpcError(
                    Code.FAILED_PRECONDITION, f"container {container.ident} has no process any more"
                )


@contextlib.contextmanager
def once(call: Call) -> Iterator[None]:
    """Of a request that an agent was killed over: that there is nobody left to signal is what it was for."""
    try:
        yield
    except RpcError as error:
        if not call.begun_before or error.code not in (Code.NOT_FOUND, Code.FAILED_PRECONDITION):
            raise


def signal_number(wanted: int | str) -> int:
    """The number of a signal given by number or name, ``RTMIN+3`` too. Raises INVALID_ARGUMENT."""
    if isinstance(wanted, int):
        return wanted
    name = wanted.upper()
    name = name if name.startswith("SIG") else f"SIG{name}"
    if name in signal.Signals.__members__:
        return int(signal.Signals[name])
    if match := _REAL_TIME.fullmatch(name):
        offset = int(match[2])
        number = signal.SIGRTMIN + offset if match[1] == "SIGRTMIN+" else signal.SIGRTMAX - offset
        if signal.SIGRTMIN <= number <= signal.SIGRTMAX:
            return number
    raise RpcError(Code.INVALID_ARGUMENT, f"signal: {wanted!r} is no signal of Linux", field="signal")
