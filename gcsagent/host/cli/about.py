"""``gcsctl info``: the agent, its guest, what it can and may, and how its boot went."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict

from gcsagent.host.cli.common import connect, print_json, print_pairs
from gcsagent.host.vm.timeline import meaning
from protocol.families.agent import Info
from protocol.limits import Limits
from protocol.types import BootStage, RuntimeInfo

_LIMITS_A_LINE = 3


async def info(args: argparse.Namespace) -> int:
    async with await connect(args) as client:
        about = await client.info(features=True)
    if args.json:
        print_json(about)
        return 0
    pairs = [*_agent(about), *_machine(about), *_runtimes(about), *_image(about)]
    pairs += _under("limits", _limits(about.limits))
    pairs += _under("boot", _stages(about.boot_stages))
    print_pairs([(name, value) for name, value in pairs if value != ""])
    return 0


def _agent(about: Info) -> list[tuple[str, object]]:
    return [
        ("agent", f"{about.agent_version}, generation {about.generation}, pid {about.agent_pid}"),
        ("protocol", f"{about.protocol_min} to {about.protocol_max}"),
        ("features", ", ".join(about.features)),
        ("code", about.code),
        ("python", about.python),
        ("msgpack", about.msgpack),
        ("state", about.state_dir),
        ("containers", f"{about.containers} with {about.processes} processes"),
    ]


def _machine(about: Info) -> list[tuple[str, object]]:
    machine = about.machine
    return [
        ("hostname", about.hostname),
        ("os", about.os),
        ("kernel", f"{about.kernel} {machine.architecture}".strip()),
        ("command line", machine.command_line),
        ("machine", machine.product),
        ("processor", machine.processor),
        ("cpus", about.cpus),
        ("memory", f"{about.memory_available_kib} KiB available of {about.memory_total_kib} KiB"),
        ("clocksource", machine.clocksource),
        ("cgroups", about.cgroups),
        ("boot id", about.boot_id),
        ("uptime", f"{about.uptime_ms / 1000:.1f} s"),
    ]


def _runtimes(about: Info) -> list[tuple[str, object]]:
    return [("runtime", _runtime(runtime)) for runtime in about.runtimes]


def _image(about: Info) -> list[tuple[str, object]]:
    """What it was stamped with, but the list of its packages: --json has that."""
    return [(f"image {name}", value) for name, value in about.build.items() if not isinstance(value, dict)]


def _limits(limits: Limits) -> list[str]:
    words = [f"{name.removeprefix('max_')} {value}" for name, value in asdict(limits).items()]
    return [", ".join(words[at : at + _LIMITS_A_LINE]) for at in range(0, len(words), _LIMITS_A_LINE)]


def _stages(stages: Sequence[BootStage]) -> list[str]:
    """When each was reached, since the kernel's clock began, and what it took."""
    lines, before = [], 0
    for stage in stages:
        took = (stage.uptime_ms - before) / 1000
        lines.append(
            f"{stage.uptime_ms / 1000:7.3f} s {took:+7.3f}  {stage.stage:<10}  {meaning(stage.stage)}"
        )
        before = stage.uptime_ms
    return lines


def _under(name: str, lines: Sequence[str]) -> list[tuple[str, object]]:
    """Lines below each other, named once."""
    return [(name if number == 0 else "", line) for number, line in enumerate(lines)]


def _runtime(runtime: RuntimeInfo) -> str:
    oldest, newest = (runtime.features.get(f"ociVersion{end}") for end in ("Min", "Max"))
    spec = f", OCI runtime spec {oldest} to {newest}" if oldest and newest else ""
    return f"{runtime.name} ({runtime.path}): {runtime.version}{spec}"
