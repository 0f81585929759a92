"""guest.resources and guest.online: CPUs and memory that are there, and those plugged in while it runs.

Putting one online keeps its writer in the kernel for a while, so that is done by a shell the supervisor
starts, within the request's deadline. What is online by then stays; asking again does the rest.
"""

from __future__ import annotations

import asyncio

from gcsagent.agent import uevents
from gcsagent.agent.call import Call
from gcsagent.agent.calls import CannotStart
from gcsagent.agent.failures import not_started, tool_failed
from gcsagent.agent.guest import sysfs
from gcsagent.agent.guest.only import refuse_outside
from gcsagent.agent.registry import Registry
from protocol.errors import Code, RpcError
from protocol.families.guest import Online, Resources
from protocol.method import Empty

# Each file gets the word its kind takes; the first that is refused says why and ends it. The kernel refuses
# as well what has come online by itself since it was looked at.
_SCRIPT = (
    "for f; do case $f in */online) w=1 ;; *) w=online ;; esac;"
    ' echo $w >"$f" || [ "$(cat "$f")" = $w ] || exit 1; done'
)


class ResourceService:
    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def resources(self, _params: Empty, _call: Call) -> Resources:
        return Resources(sysfs.cpus(), sysfs.memory(), self._registry.pressure.get().wanted())

    async def online(self, params: Online, call: Call) -> Resources:
        refuse_outside(self._registry.guest, "put CPUs or memory online")
        files = await _wanted(params)
        if files:
            await self._write(files, call)
        call.commit()
        return self.resources(Empty(), call)

    async def _write(self, files: list[str], call: Call) -> None:
        argv = ["/bin/busybox", "sh", "-c", _SCRIPT, "sh", *files]
        try:
            done = await self._registry.caller.run(argv, call.timeout)
        except CannotStart as error:
            raise not_started(error, f"cannot put CPUs or memory online: {error}") from error
        if done.timed_out:
            raise RpcError(Code.DEADLINE_EXCEEDED, "the kernel took too long to put them online; ask again")
        if done.status != 0:
            raise tool_failed(done, f"the kernel does not put them all online: {done.stderr}")


async def _wanted(params: Online) -> list[str]:
    """The files to write to, of what is to come online and is not. Raises NOT_FOUND."""
    if params.cpus is None and params.memory is None:
        return _offline(None, None)
    cpus, blocks = sysfs.numbers(params.cpus or ""), sysfs.numbers(params.memory or "")
    with uevents.changes("cpu", "memory") as changed:
        try:
            async with asyncio.timeout(params.wait_ms / 1000):
                while _absent(cpus, blocks):
                    await changed.wait()
                    changed.clear()
        except TimeoutError:
            field, missing = _absent(cpus, blocks) or ("cpus", "")
            raise RpcError(
                Code.NOT_FOUND,
                f"{field}: {missing} did not come within {params.wait_ms} ms: plug it in first",
                field=field,
            ) from None
    return _offline(cpus, blocks)


def _absent(cpus: set[int], blocks: set[int]) -> tuple[str, str] | None:
    """The argument that names what is not there, and what that is."""
    if missing := cpus - sysfs.numbers(sysfs.cpus().present):
        return "cpus", sysfs.ranges(missing)
    if missing := blocks - sysfs.memory_states().keys():
        return "memory", sysfs.ranges(missing)
    return None


def _offline(cpus: set[int] | None, blocks: set[int] | None) -> list[str]:
    """The files that put online what is not, of these or (with None) of all."""
    found = sysfs.cpus()
    off = sysfs.numbers(found.present) - sysfs.numbers(found.online)
    states = sysfs.memory_states()
    files = [f"{sysfs.SYSTEM}/cpu/cpu{each}/online" for each in sorted(off) if cpus is None or each in cpus]
    for number, state in states.items():
        if state == "offline" and (blocks is None or number in blocks):
            files.append(f"{sysfs.SYSTEM}/memory/memory{number}/state")
    return files
