"""Plugs devices into a running VM and out of it again, by QEMU's monitor.

Nothing is remembered here: QEMU is asked what there is. So the process that launched a VM and a `gcsctl` that
comes by later see the same. What can be plugged goes behind one of the root ports that `qemu.py` makes for
that.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import tenacity

from gcsagent.host.vm.errors import PlugError, QmpClosed, QmpError
from gcsagent.host.vm.qemu import HOTPLUG_PORT
from gcsagent.host.vm.qmp import QmpClient, QmpEvent

# How long QEMU may take to free a device that it has announced as deleted.
_FREE_SECONDS = 5.0

_CONNECT_SECONDS = 10.0


class HotPlug:
    """The ports for plugging of one QEMU.

    Attributes:
        qmp: its monitor.
    """

    def __init__(self, qmp: QmpClient) -> None:
        self.qmp = qmp
        self._leaving: dict[str, asyncio.Future[None]] = {}

    @classmethod
    @asynccontextmanager
    async def at(cls, path: str) -> AsyncIterator[HotPlug]:
        """Over the monitor that listens at `path`.

        Raises:
            QmpError: nobody does.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        plugs: list[HotPlug] = []
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                await asyncio.get_running_loop().sock_connect(sock, path)
            qmp = await QmpClient.open(
                sock, lambda event: plugs[0].on_event(event) if plugs else None, timeout=_CONNECT_SECONDS
            )
        except (OSError, TimeoutError) as error:
            sock.close()
            raise QmpError(f"QEMU's monitor at {path} does not answer: {error}") from error
        except BaseException:
            sock.close()
            raise
        plugs.append(cls(qmp))
        try:
            yield plugs[0]
        finally:
            qmp.close()

    def on_event(self, event: QmpEvent) -> None:
        """To be told of every event of the monitor."""
        leaving = self._leaving.get(str(event.data.get("device")))
        if leaving is None or leaving.done():
            return
        if event.name == "DEVICE_DELETED":
            leaving.set_result(None)
        elif event.name == "DEVICE_UNPLUG_GUEST_ERROR":
            leaving.set_exception(QmpError("the guest refuses to let go of it"))

    def abandon(self) -> None:
        """The VM has ended."""
        for leaving in self._leaving.values():
            if not leaving.done():
                leaving.set_exception(QmpClosed("the VM has ended"))

    async def plugged(self) -> set[str]:
        """The ids of all devices that were plugged in. Raises QmpError."""
        return {device for _, devices in await self._ports() for device in devices}

    async def places(self) -> dict[str, str]:
        """The port of each device that was plugged in, by its id. Raises QmpError."""
        return {device: port for port, devices in await self._ports() for device in devices}

    async def add(self, device: Mapping[str, Any]) -> None:
        """Plugs a device in, behind the first port that is free. The guest finds it a moment later.

        Raises:
            PlugError: all ports are taken.
            QmpError: QEMU refused.
        """
        for port, devices in await self._ports():
            if devices:
                continue
            try:
                await self.qmp.execute("device_add", {**device, "bus": port})
                return
            except QmpClosed:
                raise
            except QmpError:
                if not dict(await self._ports()).get(port):
                    raise
                # Somebody else was faster: the next one, then.
        raise PlugError("all ports for plugging are taken; unplug something first")

    async def remove(self, ident: str, timeout: float) -> None:
        """Takes a device from the guest, whether or not that still uses it.

        Args:
            timeout: seconds the guest may take to let go of it.

        Raises:
            QmpError: the guest or QEMU refused.
        """
        leaving = self._leaving[ident] = asyncio.get_running_loop().create_future()
        try:
            await self.qmp.execute("device_del", {"id": ident})
            async with asyncio.timeout(timeout):
                await leaving
        except TimeoutError:
            raise QmpError(f"the guest did not let go of {ident} within {timeout:g} s") from None
        finally:
            leaving.cancel()
            del self._leaving[ident]

    async def drop(self, command: str, arguments: Mapping[str, Any]) -> None:
        """Removes what was behind a device that has been removed. Raises QmpError."""
        # QEMU announces the deletion first and frees the device at its leisure (RCU); until then what is
        # behind it is busy, and nothing tells when it no longer is.
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(_may_pass),
            wait=tenacity.wait_exponential(multiplier=0.002, max=0.5),
            stop=tenacity.stop_after_delay(_FREE_SECONDS),
            reraise=True,
        )
        await retrying(self.qmp.execute, command, arguments)

    async def _ports(self) -> list[tuple[str, list[str]]]:
        """Each with the ids of what is behind it."""
        found = []
        for bus in await self.qmp.execute("query-pci"):
            for device in bus.get("devices", ()):
                if str(device.get("qdev_id", "")).startswith(HOTPLUG_PORT):
                    behind = device.get("pci_bridge", {}).get("devices", ())
                    found.append((str(device["qdev_id"]), [str(each.get("qdev_id")) for each in behind]))
        return found


def _may_pass(error: BaseException) -> bool:
    return isinstance(error, QmpError) and not isinstance(error, QmpClosed)


def no_plugged_one(*, there: bool) -> str:
    """Why a device cannot be unplugged that was not plugged in."""
    return "is there since the boot, and stays" if there else "does not exist"
