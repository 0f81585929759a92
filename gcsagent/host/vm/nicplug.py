"""Network cards plugged into a running VM: virtio-net devices `nic-MAC`, each with a backend."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from gcsagent.host.vm.errors import InvalidVmConfig, PlugError, QmpError
from gcsagent.host.vm.hotplug import HotPlug, no_plugged_one
from gcsagent.host.vm.nic import NIC, Nic, new_mac, nic_backend, nic_device


@dataclass(frozen=True, slots=True)
class PluggedNic:
    """A network card the VM has, and whether it can be unplugged."""

    mac: str
    removable: bool


class NicPlug:
    """The network cards of one QEMU."""

    def __init__(self, ports: HotPlug) -> None:
        self._ports = ports

    async def all(self) -> list[PluggedNic]:
        """The VM's cards, by address. Raises QmpError."""
        movable = await self._ports.plugged()
        children = await self._ports.qmp.execute("qom-list", {"path": "/machine/peripheral"})
        names = sorted(str(each.get("name", "")) for each in children)
        return [PluggedNic(Nic.named(name).mac, name in movable) for name in names if name.startswith(NIC)]

    async def plug(self, mac: str | None = None) -> str:
        """Gives the guest a card with QEMU's user-mode network; `network.apply` waits for it.

        Args:
            mac: its address; None: a random one.

        Returns:
            Its address.

        Raises:
            InvalidVmConfig: `mac` cannot be one, or is taken.
            PlugError: all ports are taken.
            QmpError: QEMU refused.
        """
        nic = Nic((mac or new_mac()).lower())
        if any(each.mac == nic.mac for each in await self.all()):
            raise InvalidVmConfig(f"the VM has a network card with the address {nic.mac} already")
        await self._ports.qmp.execute("netdev_add", nic_backend(nic))
        try:
            await self._ports.add(nic_device(nic))
        except BaseException:
            with contextlib.suppress(QmpError):
                await self._drop(nic)
            raise
        return nic.mac

    async def unplug(self, mac: str, timeout: float) -> None:
        """Takes a card from the guest, or the container it is in.

        Args:
            timeout: seconds the guest may take to let go of it.

        Raises:
            PlugError: there is no such card, or not one that was plugged in.
            QmpError: the guest or QEMU refused.
        """
        nic = Nic(mac.lower())
        found = next((each for each in await self.all() if each.mac == nic.mac), None)
        if found is None or not found.removable:
            problem = no_plugged_one(there=found is not None)
            raise PlugError(f"the network card with the address {mac} {problem}")
        await self._ports.remove(nic.name, timeout)
        await self._drop(nic)

    async def _drop(self, nic: Nic) -> None:
        await self._ports.drop("netdev_del", {"id": nic.backend})
