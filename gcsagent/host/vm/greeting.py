"""The last step of a start: a guest that says it is ready has to answer over vsock, too."""

from __future__ import annotations

import asyncio

from gcsagent.host.dialogue import greet
from gcsagent.host.errors import HostError
from gcsagent.host.vm.guest import Guest
from protocol.address import parse_dial
from protocol.errors import RemoteProtocolError, RpcError

ANSWER_SECONDS = {"kvm": 10.0, "tcg": 20.0}
"""A ready guest answers in a few hundredths of a second; an emulated one on a busy host may take some."""


async def answered(guest: Guest, address: str, seconds: float) -> None:
    """Returns once the agent at ``address`` has answered a hello.

    Raises:
        BootError: it has not in that time, refused, or is something else; or the guest ended over it.
    """
    greeting = asyncio.create_task(_greet(address, seconds))
    ending = asyncio.create_task(guest.exited())
    try:
        await asyncio.wait((greeting, ending), return_when=asyncio.FIRST_COMPLETED)
        if ending.done():
            raise guest.boot.error(ending.result().reason)
        greeting.result()
    except (HostError, RpcError, RemoteProtocolError) as error:
        raise guest.boot.error(
            f"the agent is ready but cannot be reached over vsock: {error}", explained=True
        ) from error
    finally:
        for task in (greeting, ending):
            task.cancel()
        await asyncio.gather(greeting, ending, return_exceptions=True)


async def _greet(address: str, seconds: float) -> None:
    dialogue, _ = await greet(parse_dial(address), timeout=seconds, client_name="gcsagent.host.vm")
    dialogue.close()
