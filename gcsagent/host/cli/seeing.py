"""The commands that show how the agent is doing: its numbers, its stacks, its log."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from gcsagent.host.cli.common import connect, print_json
from gcsagent.host.metrics import metrics, samples

Add = Callable[..., argparse.ArgumentParser]


def add_seeing_commands(commands: Any, add: Add) -> None:
    add(
        commands,
        "metrics",
        show_metrics,
        "print numbers about agent, supervisor, containers and streams, in Prometheus' text format",
        "gcsctl --vm dev metrics > /var/lib/node_exporter/dev.prom",
    )


async def show_metrics(args: argparse.Namespace) -> int:
    async with await connect(args) as client:
        text = await metrics(client)
    if args.json:
        print_json(samples(text))
    else:
        print(text, end="", flush=True)
    return 0
