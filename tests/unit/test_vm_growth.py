"""CPUs and memory plugged through a monitor, and what the guest's agent is then asked to put to use."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from gcsagent.host.client import Client
from gcsagent.host.grow import grow
from gcsagent.host.vm.errors import InvalidVmConfig, QmpError
from gcsagent.host.vm.growth import PluggedMemory, plug_cpus, plug_memory
from gcsagent.host.vm.qemu import QemuConfig, kernel_cmdline, qemu_argv
from protocol.errors import RemoteProtocolError
from protocol.families.guest import CpuLists, MemoryBlocks, Online, Resources
from tests.fakes.fake_agent import FakeAgent
from tests.unit.test_vm_parts import QEMU, values

GIB = 1 << 30


class Monitor:
    """QEMU, as far as this goes: four places for CPUs of which two are taken, memory behind 4 GiB."""

    def __init__(self, refuses: str = "") -> None:
        self.refuses = refuses
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.backends: dict[str, int] = {}
        self.pieces: list[dict[str, Any]] = []
        self.cpus = {0, 1}

    async def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        given = arguments or {}
        self.asked.append((command, given))
        if command == self.refuses:
            raise QmpError("QEMU refused: no room")
        if command == "query-hotpluggable-cpus":
            return [self._slot(core) for core in reversed(range(4))]
        if command == "query-memory-devices":
            return [{"type": "dimm", "data": piece} for piece in self.pieces]
        if command == "object-add":
            self.backends[given["id"]] = given["size"]
        elif command == "object-del":
            del self.backends[given["id"]]
        elif command == "device_add" and given["driver"] == "pc-dimm":
            address = 4 * GIB + sum(piece["size"] for piece in self.pieces)
            size = self.backends[given["memdev"]]
            self.pieces.append({"id": given["id"], "addr": address, "size": size})
        elif command == "device_add":
            self.cpus.add(given["core-id"])
        return {}

    def _slot(self, core: int) -> dict[str, Any]:
        slot = {"props": {"socket-id": 0, "core-id": core}, "vcpus-count": 1, "type": "max-x86_64-cpu"}
        return slot | ({"qom-path": f"/machine/{core}"} if core in self.cpus else {})


def test_cpus_are_plugged_in_the_guests_order() -> None:
    async def body() -> None:
        monitor = Monitor()
        await plug_cpus(monitor, 1)  # type: ignore[arg-type]
        assert monitor.asked[-1] == (
            "device_add",
            {"driver": "max-x86_64-cpu", "id": "cpu-0-2", "socket-id": 0, "core-id": 2},
        )
        for count in (2, 0):
            with pytest.raises(InvalidVmConfig, match="room for 1 more"):
                await plug_cpus(monitor, count)  # type: ignore[arg-type]

    asyncio.run(body())


def test_memory_is_plugged_in_pieces() -> None:
    async def body() -> None:
        monitor = Monitor()
        assert await plug_memory(monitor, 1024) == PluggedMemory(4 * GIB, GIB)  # type: ignore[arg-type]
        assert await plug_memory(monitor, 512) == PluggedMemory(5 * GIB, GIB // 2)  # type: ignore[arg-type]
        assert [piece["id"] for piece in monitor.pieces] == ["dimm0", "dimm1"]
        assert all(given["share"] for command, given in monitor.asked if command == "object-add")
        with pytest.raises(InvalidVmConfig):
            await plug_memory(monitor, 0)  # type: ignore[arg-type]

    asyncio.run(body())


def test_memory_that_does_not_fit_leaves_nothing_in_qemu() -> None:
    async def body() -> None:
        monitor = Monitor(refuses="device_add")
        with pytest.raises(QmpError, match="no room"):
            await plug_memory(monitor, 1024)  # type: ignore[arg-type]
        assert monitor.backends == {}

    asyncio.run(body())


@pytest.mark.parametrize(
    "online, there, asked, new", [("0-1", "0-1", "2,3", 2), ("0", "0-1", "1,2", 1), ("0", "0-2", "1,2", 0)]
)
def test_growing_asks_the_guest_for_what_is_idle_and_what_is_new(
    tmp_path: Path, online: str, there: str, asked: str, new: int
) -> None:
    async def body() -> None:
        monitor = Monitor()
        has = Resources(CpuLists("0-3", there, online), MemoryBlocks(1, 1, 128 << 20, "0-7", ""))
        async with FakeAgent(tmp_path / "s") as agent, await Client.connect(agent.address) as client:
            agent.handlers["guest.resources"] = lambda params: has
            agent.handlers["guest.online"] = lambda params: has
            assert await grow(monitor, client, cpus=2, memory_mib=256) == has  # type: ignore[arg-type]
            [told] = agent.named("guest.online")
            assert (told["cpus"], told["memory"]) == (asked, "32-33")
            with pytest.raises(InvalidVmConfig, match="multiples of 128 MiB"):
                await grow(monitor, client, memory_mib=100)  # type: ignore[arg-type]
        plugged = [
            given for command, given in monitor.asked if command == "device_add" and "core-id" in given
        ]
        assert len(plugged) == new

    asyncio.run(body())


def test_a_guest_that_says_nonsense(tmp_path: Path) -> None:
    async def body() -> None:
        nonsense = Resources(CpuLists("0-3", "all", "0"), MemoryBlocks(1, 1, 1, "", ""))
        async with FakeAgent(tmp_path / "s") as agent, await Client.connect(agent.address) as client:
            agent.handlers["guest.resources"] = lambda params: nonsense
            with pytest.raises(RemoteProtocolError):
                await grow(Monitor(), client, cpus=1)  # type: ignore[arg-type]
        assert Online() == Online(None, None)

    asyncio.run(body())


def test_room_to_grow_on_qemus_command_line() -> None:
    def words(**change: Any) -> tuple[list[str], list[str], str]:
        config: QemuConfig = dataclasses.replace(QEMU, **change)
        argv = qemu_argv(config)
        return values(argv, "-smp"), values(argv, "-m"), kernel_cmdline(config)

    assert words()[:2] == (["2"], ["512M"])
    assert "virtio-balloon-pci,free-page-reporting=on" in values(qemu_argv(QEMU), "-device")
    smp, memory, cmdline = words(max_cpus=4, max_memory_mib=2048)
    assert (smp, memory) == (["4"], ["512M,slots=16,maxmem=2048M"])  # TCG: they are there, parked
    assert "maxcpus=2" in cmdline.split()
    smp, _, cmdline = words(accelerator="kvm", max_cpus=4)
    assert smp == ["2,maxcpus=4"]
    assert "maxcpus" not in cmdline
    for change in ({"max_cpus": 1}, {"max_cpus": 65}, {"max_memory_mib": 511}, {"max_memory_mib": 1 << 21}):
        with pytest.raises(InvalidVmConfig, match="max_"):
            words(**change)
