"""Commands about one container or several: each is tried, and what fails is told of each."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from gcsagent.host.cli.common import UsageError, connect, print_json
from gcsagent.host.client import Client
from gcsagent.host.errors import HostError
from protocol.errors import RpcError

if TYPE_CHECKING:
    from gcsagent.host.vm.errors import VmError  # a parser needs nothing of the launcher's

Work = Callable[[Client, argparse.Namespace, str], Awaitable[Mapping[str, Any]]]
"""What is done with one container, and the document that ``--json`` prints of it."""

Failure: TypeAlias = "HostError | RpcError | VmError"


class SomeFailed(HostError):
    """Of several, each for a reason of its own."""

    def __init__(self, errors: list[Failure]) -> None:
        super().__init__(f"{len(errors)} failed")
        self.errors = errors


def each(work: Work, *, at_once: bool = False) -> Callable[[argparse.Namespace], Awaitable[int]]:
    """The handler of a command with ``ids``: one after the other, as given (a pod's member before its
    sandbox), unless it is ``at_once``: for what waits."""

    async def handler(args: argparse.Namespace) -> int:
        async with await connect(args) as client:
            waiting = (_outcome(work, client, args, container) for container in args.ids)
            outcomes = await asyncio.gather(*waiting) if at_once else [await one for one in waiting]
        for outcome in outcomes:
            if args.json and isinstance(outcome, Mapping):
                print_json(outcome)
        errors = [outcome for outcome in outcomes if not isinstance(outcome, Mapping)]
        if errors:
            raise errors[0] if len(errors) == 1 else SomeFailed(errors)
        return 0

    return handler


async def _outcome(
    work: Work, client: Client, args: argparse.Namespace, container: str
) -> Mapping[str, Any] | Failure:
    from gcsagent.host.vm.errors import VmError

    try:
        return await work(client, args, container)
    except UsageError:
        raise  # about all of them
    except (HostError, RpcError, VmError) as error:
        return error
