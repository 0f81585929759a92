"""Plugs CPUs and memory into a running VM, through QEMU's monitor (QEMU docs, cpu-hotplug and pc-dimm).

QEMU returns once the guest has been told; `gcsagent.host.grow` has the guest's agent put them to use. What a
VM can grow to is fixed when it is launched.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from gcsagent.host.vm.errors import InvalidVmConfig, QmpError
from gcsagent.host.vm.qmp import QmpClient


@dataclass(frozen=True, slots=True)
class PluggedMemory:
    """Where a new piece of memory is in the guest's address space, in bytes."""

    address: int
    size: int


async def plug_cpus(qmp: QmpClient, count: int) -> None:
    """Plugs `count` CPUs, or as many as it can before one fails.

    Raises:
        InvalidVmConfig: there is no room for so many: launch with more `max_cpus`.
        QmpError: QEMU did not do it.
    """
    slots = [slot for slot in await qmp.execute("query-hotpluggable-cpus") if "qom-path" not in slot]
    if not 1 <= count <= len(slots):
        raise InvalidVmConfig(
            f"{count} cpus: this VM has room for {len(slots)} more (max_cpus says so at launch)"
        )
    # QEMU lists the last one first; the guest numbers them as they come.
    for slot in slots[::-1][:count]:
        ident = "cpu-" + "-".join(str(number) for number in slot["props"].values())
        await qmp.execute("device_add", {"driver": slot["type"], "id": ident, **slot["props"]})


async def plug_memory(qmp: QmpClient, size_mib: int) -> PluggedMemory:
    """Plugs one piece of memory.

    Raises:
        InvalidVmConfig: not a size that a VM can be given.
        QmpError: QEMU did not do it: no room left (`max_memory_mib`), or no slot.
    """
    if size_mib < 1:
        raise InvalidVmConfig(f"{size_mib} MiB of memory: at least 1")
    pieces = await _pieces(qmp)
    number = next(n for n in range(len(pieces) + 1) if f"dimm{n}" not in pieces)
    backend, device, size = f"memory{number}", f"dimm{number}", size_mib << 20
    # Shared, because a vsock daemon maps it as well.
    options = {"qom-type": "memory-backend-memfd", "id": backend, "size": size, "share": True}
    await qmp.execute("object-add", options)
    try:
        await qmp.execute("device_add", {"driver": "pc-dimm", "id": device, "memdev": backend})
    except BaseException:
        with contextlib.suppress(QmpError):
            await qmp.execute("object-del", {"id": backend})
        raise
    found = (await _pieces(qmp))[device]
    return PluggedMemory(found["addr"], found["size"])


async def _pieces(qmp: QmpClient) -> dict[str, dict[str, Any]]:
    return {each["data"]["id"]: each["data"] for each in await qmp.execute("query-memory-devices")}
