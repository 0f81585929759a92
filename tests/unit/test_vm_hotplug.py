"""Plugging network cards in by QEMU's monitor, played here over a real socket."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from gcsagent.host.vm.errors import InvalidVmConfig, PlugError, QmpError
from gcsagent.host.vm.hotplug import HotPlug
from gcsagent.host.vm.nicplug import NicPlug, PluggedNic
from gcsagent.host.vm.qmp import QmpClient

MAC, OTHER = "52:54:00:00:00:01", "52:54:00:00:00:02"
BOOT = "nic-525400000001"


class Monitor:
    """A QEMU with two ports for plugging; ``thief`` takes the first of them when something is to go there."""

    def __init__(self, thief: bool = False, mute: bool = False) -> None:
        self.ports: dict[str, str] = {"plug0": "", "plug1": ""}
        self.devices, self.backends = {BOOT}, {f"net-{BOOT}"}
        self.thief, self.mute = thief, mute
        self.busy = 2
        self.tell: Callable[[dict[str, Any]], None] = lambda message: None

    def answer(self, command: str, arguments: dict[str, Any]) -> Any:
        match command:
            case "query-pci":
                ports = [
                    {"qdev_id": port, "pci_bridge": {"devices": [{"qdev_id": there}] if there else []}}
                    for port, there in self.ports.items()
                ]
                return [{"devices": [{"qdev_id": "x"}, *ports]}]
            case "qom-list":
                return [{"name": name} for name in (*sorted(self.devices), "plug0")]
            case "netdev_add":
                self.backends.add(arguments["id"])
            case "netdev_del":
                self.busy -= 1
                if self.busy:
                    raise LookupError("in use")
                self.backends.discard(arguments["id"])
            case "device_add":
                self._add(arguments)
            case "device_del":
                self._del(arguments["id"])
        return {}

    def _add(self, arguments: dict[str, Any]) -> None:
        if self.thief:
            self.thief, self.ports["plug0"] = False, "somebody"
        if self.ports[arguments["bus"]]:
            raise LookupError("slot 0 function 0 not available")
        self.ports[arguments["bus"]] = arguments["id"]
        self.devices.add(arguments["id"])

    def _del(self, ident: str) -> None:
        if self.mute:
            return
        self.devices.discard(ident)
        self.ports = {port: "" if there == ident else there for port, there in self.ports.items()}
        self.tell({"event": "DEVICE_DELETED", "data": {"device": ident}})

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.tell = lambda message: writer.write(json.dumps(message).encode() + b"\n")
        self.tell({"QMP": {}})
        while line := await reader.readline():
            asked = json.loads(line)
            try:
                answer = {"return": self.answer(asked["execute"], asked.get("arguments", {}))}
            except LookupError as error:
                answer = {"error": {"class": "GenericError", "desc": str(error)}}
            self.tell({**answer, "id": asked["id"]})
        writer.close()


@asynccontextmanager
async def plugging(monitor: Monitor) -> AsyncIterator[NicPlug]:
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_unix_connection(sock=theirs)
    serving = asyncio.create_task(monitor.serve(reader, writer))
    ports: list[HotPlug] = []
    ours.setblocking(False)
    qmp = await QmpClient.open(ours, lambda event: ports[0].on_event(event))
    ports.append(HotPlug(qmp))
    yield NicPlug(ports[0])
    qmp.close()
    await serving


def test_a_card_comes_and_goes_with_its_backend() -> None:
    async def work() -> None:
        monitor = Monitor()
        async with plugging(monitor) as cards:
            assert await cards.plug(OTHER.upper()) == OTHER
            assert monitor.ports["plug0"] == "nic-525400000002"
            assert await cards.all() == [PluggedNic(MAC, False), PluggedNic(OTHER, True)]
            await cards.unplug(OTHER, 5.0)
            assert (monitor.devices, monitor.backends) == ({BOOT}, {f"net-{BOOT}"})

    asyncio.run(work())


def test_a_port_that_somebody_else_takes_is_passed_over() -> None:
    async def work() -> None:
        monitor = Monitor(thief=True)
        async with plugging(monitor) as cards:
            await cards.plug(OTHER)
            assert monitor.ports == {"plug0": "somebody", "plug1": "nic-525400000002"}

    asyncio.run(work())


def test_what_cannot_be_plugged_leaves_no_backend() -> None:
    async def work() -> None:
        monitor = Monitor()
        monitor.ports = {"plug0": "a", "plug1": "b"}
        async with plugging(monitor) as cards:
            with pytest.raises(PlugError, match="all ports"):
                await cards.plug(OTHER)
            assert monitor.backends == {f"net-{BOOT}"}
            with pytest.raises(InvalidVmConfig, match="already"):
                await cards.plug(MAC)
            with pytest.raises(PlugError, match="since the boot"):
                await cards.unplug(MAC, 5.0)
            with pytest.raises(PlugError, match="does not exist"):
                await cards.unplug(OTHER, 5.0)

    asyncio.run(work())


def test_a_guest_that_keeps_its_card_is_given_up() -> None:
    async def work() -> None:
        async with plugging(Monitor(mute=True)) as cards:
            await cards.plug(OTHER)
            with pytest.raises(QmpError, match="did not let go"):
                await cards.unplug(OTHER, 0.05)

    asyncio.run(work())


def test_a_monitor_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    async def work() -> None:
        async with HotPlug.at(str(tmp_path / "nobody")):
            pass

    with pytest.raises(QmpError, match="does not answer"):
        asyncio.run(work())
