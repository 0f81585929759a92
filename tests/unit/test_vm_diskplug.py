"""Plugging disks, with a scripted monitor in QEMU's place: what is asked, and what a failure leaves."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from gcsagent.host.vm.diskplug import DiskPlug, PluggedDisk
from gcsagent.host.vm.errors import DiskError, InvalidVmConfig, PlugError, QmpError
from gcsagent.host.vm.hotplug import HotPlug

SECONDS = 10.0


class Monitor:
    """QEMU's view of two ports, the boot disk, and what is plugged in. ``refuse`` names failing commands."""

    def __init__(self) -> None:
        self.nodes: dict[str, dict[str, Any]] = {"disk-rootfs": {"read-only": True, "filename": "/r.erofs"}}
        self.ports: dict[str, str] = {"plug0": "", "plug1": ""}
        self.asked: list[str] = []
        self.refuse: dict[str, int] = {}
        self.silent = self.guest_refuses = False
        self.over = asyncio.Event()
        self._writer: asyncio.StreamWriter | None = None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._send({"QMP": {}})
        try:
            with contextlib.suppress(ConnectionError):
                while line := await reader.readline():
                    message = json.loads(line)
                    self._answer(message["execute"], message["arguments"], message["id"])
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
            self.over.set()

    def _send(self, message: dict[str, Any]) -> None:
        assert self._writer is not None
        self._writer.write(json.dumps(message).encode() + b"\n")

    def _answer(self, command: str, arguments: dict[str, Any], number: int) -> None:
        if not command.startswith(("query", "qmp")):
            self.asked.append(command)
        if self.refuse.get(command, 0) > 0:
            self.refuse[command] -= 1
            self._send({"error": {"desc": f"no {command}"}, "id": number})
            return
        result = getattr(self, command.replace("-", "_"))(
            **{k.replace("-", "_"): v for k, v in arguments.items()}
        )
        self._send({"return": result, "id": number})

    def qmp_capabilities(self) -> None:
        pass

    def query_pci(self) -> list[dict[str, Any]]:
        ports = [
            {"qdev_id": port, "pci_bridge": {"devices": [{"qdev_id": device}] if device else []}}
            for port, device in self.ports.items()
        ]
        return [{"devices": [{"qdev_id": "vsock-port", "pci_bridge": {}}, {"qdev_id": ""}, *ports]}]

    def query_block(self) -> list[dict[str, Any]]:
        return [
            {
                "qdev": f"/machine/peripheral/{name}/virtio-backend",
                "inserted": {"ro": node["read-only"], "image": {"filename": node["filename"]}},
            }
            for name, node in self.nodes.items()
        ] + [{"device": "cd0", "qdev": "/machine/unattached/device[1]"}]

    def blockdev_add(self, node_name: str, file: dict[str, Any], **_: Any) -> None:
        self.nodes[node_name] = file

    def blockdev_del(self, node_name: str) -> None:
        del self.nodes[node_name]

    def device_add(self, id: str, bus: str, **_: Any) -> None:
        self.ports[bus] = id

    def device_del(self, id: str) -> None:
        if self.silent:
            return
        if self.guest_refuses:
            self._send({"event": "DEVICE_UNPLUG_GUEST_ERROR", "data": {"device": id}})
            return
        self.ports = {port: "" if there == id else there for port, there in self.ports.items()}
        self._send({"event": "DEVICE_DELETED", "data": {"path": "/machine/peripheral/x"}})
        self._send({"event": "DEVICE_DELETED", "data": {"device": id}})


def with_monitor(tmp_path: Path, body: Callable[[Monitor, DiskPlug], Awaitable[None]]) -> None:
    async def scenario() -> None:
        monitor = Monitor()
        async with await asyncio.start_unix_server(monitor.serve, tmp_path / "qmp"), asyncio.timeout(SECONDS):
            async with HotPlug.at(str(tmp_path / "qmp")) as ports:
                await body(monitor, DiskPlug(ports))
            await monitor.over.wait()

    asyncio.run(scenario())


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk, with a comma"
    path.write_bytes(bytes(4096))
    return path


def test_disks_come_and_go(tmp_path: Path, image: Path) -> None:
    async def body(monitor: Monitor, plug: DiskPlug) -> None:
        await plug.plug(image, "data0", read_only=True)
        await plug.plug(image, "data1")
        boot = PluggedDisk("rootfs", "/r.erofs", True, False)
        assert await plug.all() == [
            PluggedDisk("data0", str(image), True, True),
            PluggedDisk("data1", str(image), False, True),
            boot,
        ]
        assert monitor.ports == {"plug0": "disk-data0", "plug1": "disk-data1"}
        monitor.refuse["blockdev-del"] = 2  # busy at first
        await plug.unplug("data0", SECONDS)
        assert monitor.ports["plug0"] == ""
        await plug.unplug("data1", SECONDS)
        assert await plug.all() == [boot]

    with_monitor(tmp_path, body)


@pytest.mark.parametrize("serial", ["", "a" * 21, "a b", "-a", "a,b", "rootfs"])
def test_serial_numbers_that_cannot_be(tmp_path: Path, image: Path, serial: str) -> None:
    async def body(monitor: Monitor, plug: DiskPlug) -> None:
        with pytest.raises(InvalidVmConfig, match="serial number"):
            await plug.plug(image, serial)
        assert monitor.asked == []

    with_monitor(tmp_path, body)


def test_what_fails_leaves_no_node(tmp_path: Path, image: Path) -> None:
    async def body(monitor: Monitor, plug: DiskPlug) -> None:
        with pytest.raises(DiskError, match="No such file"):
            await plug.plug(tmp_path / "none", "data0")
        monitor.refuse["device_add"] = 1
        with pytest.raises(QmpError, match="no device_add"):
            await plug.plug(image, "data0")
        monitor.ports = dict.fromkeys(monitor.ports, "something")
        with pytest.raises(PlugError, match="all ports"):
            await plug.plug(image, "data0")
        assert set(monitor.nodes) == {"disk-rootfs"}

    with_monitor(tmp_path, body)


def test_disks_that_do_not_go(tmp_path: Path, image: Path) -> None:
    async def body(monitor: Monitor, plug: DiskPlug) -> None:
        for serial, problem in (("none", "does not exist"), ("rootfs", "since the boot")):
            with pytest.raises(DiskError, match=problem):
                await plug.unplug(serial, SECONDS)
        await plug.plug(image, "data0")
        monitor.guest_refuses = True
        with pytest.raises(QmpError, match="guest refuses"):
            await plug.unplug("data0", SECONDS)
        monitor.silent = True
        with pytest.raises(QmpError, match=r"did not let go of disk-data0 within 0\.05 s"):
            await plug.unplug("data0", 0.05)
        assert "disk-data0" in monitor.nodes

    with_monitor(tmp_path, body)


def test_no_monitor(tmp_path: Path) -> None:
    async def scenario() -> None:
        with pytest.raises(QmpError, match="does not answer"):
            async with HotPlug.at(str(tmp_path / "qmp")):
                pass

    asyncio.run(scenario())
