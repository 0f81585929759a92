"""Signals to everything in a cgroup, so that nothing gets away by forking.

SIGKILL is one write where the kernel has cgroup.kill. Any other signal, and any kernel without, takes a
frozen cgroup: in it nobody forks, so that whoever is found once all stand still is everybody. While they are
coming to a halt new ones may appear; they are found by looking again. An agent that is killed in between
leaves a container frozen that is not paused, which is how its successor knows (reload).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable
from types import TracebackType

from gcsagent.agent.cgroups import Cgroup, signal_all
from gcsagent.agent.kernfs import KernelFiles

FREEZE_SECONDS = 2.0
"""How long a process may take to stand still. One that sleeps in the kernel does not fork either."""

EMPTY_SECONDS = 10.0
"""How long one may take to die of SIGKILL."""

_FIRST_LOOK, _LAST_LOOK = 0.001, 0.1

_log = logging.getLogger("agent.reach")


async def signal_everybody(cgroup: Cgroup, number: int, files: KernelFiles) -> int:
    """Returns how many there were. A frozen cgroup stays so, unless they are to die."""
    if number == signal.SIGKILL:
        return await kill_everybody(cgroup, files)
    if cgroup.is_frozen():
        return signal_all(cgroup.pids(), number)
    try:
        return await _signal_frozen(cgroup, number, files)
    finally:
        cgroup.unfreeze()


async def kill_everybody(cgroup: Cgroup, files: KernelFiles) -> int:
    """SIGKILLs everything in it, frozen or not, and leaves it thawed. Returns how many there were."""
    count = len(cgroup.pids())
    if not count:
        return 0
    try:
        if not cgroup.kill_at_once():
            await _signal_frozen(cgroup, signal.SIGKILL, files)
    finally:
        cgroup.thaw()  # with v1 a frozen process does not die before that
    return count


async def wait_until_empty(cgroup: Cgroup, files: KernelFiles, seconds: float = EMPTY_SECONDS) -> bool:
    """Whether nobody is left in it within that time."""
    return await _until(cgroup, files, seconds, lambda: not cgroup.pids())


async def _signal_frozen(cgroup: Cgroup, number: int, files: KernelFiles) -> int:
    reached: set[int] = set()

    def reach() -> bool:
        still = cgroup.stands_still()  # asked before: who is found afterwards is everybody
        found = cgroup.pids() - reached
        signal_all(found, number)
        reached.update(found)
        return still

    cgroup.freeze()
    if not await _until(cgroup, files, FREEZE_SECONDS, reach):
        _log.warning("not all stand still for a signal", extra={"fields": {"cgroup": cgroup.path}})
    return len(reached)


async def _until(cgroup: Cgroup, files: KernelFiles, seconds: float, look: Callable[[], bool]) -> bool:
    with _Following(cgroup, files) as following:
        try:
            async with asyncio.timeout(seconds):
                while not look():
                    await following.change()
        except TimeoutError:
            return look()
    return True


class _Following:
    """A cgroup's coming to a halt and becoming empty: v2 tells, v1 has to be asked now and then."""

    def __init__(self, cgroup: Cgroup, files: KernelFiles) -> None:
        self._files, self._watch = files, -1
        self._changed = asyncio.Event()
        self._delay: float | None = _FIRST_LOOK
        path = cgroup.file("cgroup.events")
        if path is not None:
            with contextlib.suppress(OSError):
                self._watch = files.watch(path, self._changed.set)
                self._delay = None if cgroup.all_in_v2() else _FIRST_LOOK

    def __enter__(self) -> _Following:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.forget(self._watch)

    async def change(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._delay):
                await self._changed.wait()
        self._changed.clear()
        if self._delay is not None:
            self._delay = min(2 * self._delay, _LAST_LOOK)
