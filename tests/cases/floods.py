"""One host floods, another stops in the middle of a message: a third must not notice."""

from __future__ import annotations

import asyncio
import contextlib

from gcsagent.host.dialogue import greet
from protocol.address import parse_dial
from protocol.families.events import Subscribe
from protocol.framing import Request, encode
from tests.cases.bystander import undisturbed
from tests.cases.target import Target, case

REQUESTS = 20_000
PADDING = {"ignored": "x" * 300}
"""Six megabytes in all: more than there are buffers on the way, so that it shows whether they are read."""

HALF = b"\x94\x00\x01\xdb\x00\x0f\xff\x00" + b"x" * 200_000
"""A request whose method is declared as a string of almost 1 MiB."""


@case
async def whoever_floods_stalls_or_is_half_done_hurts_only_itself(target: Target) -> None:
    """Requests whose answers nobody reads, events that nobody reads, a message that does not end."""
    loop = asyncio.get_running_loop()
    async with undisturbed(target) as bystander, contextlib.AsyncExitStack() as stack:
        flooding = []
        for _ in range(3):
            dialogue, _ = await greet(parse_dial(target.address), timeout=10 * target.pace, client_name="bad")
            stack.callback(dialogue.close)
            flooding.append(dialogue)
        flood, lazy, half = flooding
        await lazy.ask("events.subscribe", Subscribe(after=0))
        await loop.sock_sendall(half.sock, HALF)
        asked = b"".join(encode(Request(number + 10, "agent.info", PADDING)) for number in range(REQUESTS))
        sending = asyncio.ensure_future(loop.sock_sendall(flood.sock, asked))
        stack.callback(sending.cancel)
        await bystander.several(5)
        assert not sending.done()  # it is not read any more
