"""A running VM gets more CPUs and memory: plugged in by QEMU, put to use by the guest's agent."""

from __future__ import annotations

from gcsagent.host.client import Client
from gcsagent.host.vm.errors import InvalidVmConfig
from gcsagent.host.vm.growth import plug_cpus, plug_memory
from gcsagent.host.vm.qmp import QmpClient
from protocol import checks
from protocol.errors import RemoteProtocolError
from protocol.families.guest import Online, Resources
from protocol.method import Empty

WAIT_SECONDS = 30.0
"""How long the guest may take to find what was plugged in."""


async def grow(qmp: QmpClient, client: Client, *, cpus: int = 0, memory_mib: int = 0) -> Resources:
    """What the guest has, once it uses the new ones.

    Raises:
        InvalidVmConfig: there is no room for so much, or memory is not a multiple of the guest's block size.
        QmpError: QEMU did not do it.
        RpcError: the guest did not: NOT_FOUND when nothing came in time.
    """
    before: Resources = await client.call("guest.resources", Empty())
    block = before.memory.block_bytes
    if memory_mib and (not block or (memory_mib << 20) % block):
        raise InvalidVmConfig(f"{memory_mib} MiB of memory: this guest takes multiples of {block >> 20} MiB")
    new_cpus, new_blocks = None, None
    if cpus:
        new_cpus = await _add_cpus(qmp, before, cpus)
    if memory_mib:
        plugged = await plug_memory(qmp, memory_mib)
        first = plugged.address // block
        new_blocks = f"{first}-{first + plugged.size // block - 1}"
    wanted = Online(new_cpus, new_blocks, round(WAIT_SECONDS * 1000))
    result: Resources = await client.call("guest.online", wanted, deadline=2 * WAIT_SECONDS)
    return result


async def _add_cpus(qmp: QmpClient, before: Resources, count: int) -> str:
    """Numbers of CPUs to put online: those that are there and idle, then new ones."""
    there = numbers(before.cpus.present)
    chosen = sorted(there - numbers(before.cpus.online))[:count]
    if missing := count - len(chosen):
        await plug_cpus(qmp, missing)
        # Linux gives a new CPU the lowest number that is free.
        chosen += sorted(numbers(before.cpus.possible) - there)[:missing]
    return ",".join(map(str, chosen))


def numbers(text: str) -> set[int]:
    """Of one of the guest's lists, which may be empty, or anything. Raises RemoteProtocolError."""
    if text and checks.cpuset(text) is not None:
        raise RemoteProtocolError("malformed", "guest.resources: a list of CPUs is none")
    return checks.cpu_list(text) if text else set()
