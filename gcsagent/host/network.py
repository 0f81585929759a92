"""Networks by way of a client: what ``gcsctl network`` and ``--net user`` are made of."""

from __future__ import annotations

from gcsagent.host.client import Client
from gcsagent.host.vm.nic import USER_ADDRESS, USER_DNS, USER_GATEWAY
from protocol.families.network import (
    Applied,
    ApplyNetwork,
    Attached,
    AttachNetwork,
    Interface,
    NetworkRef,
    NetworkState,
    RemoveInterface,
    Route,
)
from protocol.pods import Dns

ARRIVAL_MS = 20_000
"""What a guest may take to find a card that has been plugged in."""


async def apply(client: Client, params: ApplyNetwork, *, deadline: float | None = None) -> Applied:
    """Makes a network namespace what ``params`` says. Raises what :meth:`Client.call` raises."""
    result: Applied = await client.call("network.apply", params, deadline=deadline)
    return result


async def attach(client: Client, params: AttachNetwork) -> Attached:
    """Gives a container an interface on a bridge in the guest."""
    result: Attached = await client.call("network.attach", params)
    return result


async def state(client: Client, container: str | None = None) -> NetworkState:
    """The network of a container, or of the guest."""
    result: NetworkState = await client.call("network.state", NetworkRef(container))
    return result


async def remove(client: Client, interface: str, container: str | None = None) -> None:
    """Removes an interface that was made; gives one that was moved back to the guest."""
    await client.call("network.remove", RemoveInterface(interface, container))


async def use_user_network(client: Client, mac: str, name: str = "eth0") -> Applied:
    """Configures the card ``mac`` of the guest for QEMU's user-mode network."""
    card = Interface(name, mac=mac, addresses=(USER_ADDRESS,))
    return await apply(
        client,
        ApplyNetwork(
            interfaces=(Interface("lo"), card),
            routes=(Route("default", USER_GATEWAY, name),),
            dns=Dns((USER_DNS,)),
            wait_ms=ARRIVAL_MS,
        ),
    )
