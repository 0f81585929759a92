"""The machine the agent runs on, as its firmware and its kernel describe it."""

from __future__ import annotations

import os

import msgpack

from gcsagent.agent import proc
from protocol.types import MachineInfo

CPUINFO = "proc/cpuinfo"
DMI = "sys/class/dmi/id"
CLOCKSOURCE = "sys/devices/system/clocksource/clocksource0/current_clocksource"
COMMAND_LINE = "proc/cmdline"


def machine(guest: bool, root: str = "/") -> MachineInfo:
    """What cannot be found out is empty; so is what outside a guest is not the client's business."""
    maker, name = (_line(root, f"{DMI}/{part}") for part in ("sys_vendor", "product_name"))
    return MachineInfo(
        os.uname().machine,
        _processor(root),
        f"{maker} {name}".strip(),
        _line(root, CLOCKSOURCE),
        _line(root, COMMAND_LINE) if guest else "",
    )


def msgpack_version() -> str:
    """With how it is made: the pure Python one is many times slower."""
    number = ".".join(map(str, msgpack.version))
    return f"{number} ({'Python' if msgpack.Packer.__module__ == 'msgpack.fallback' else 'C'})"


def _processor(root: str) -> str:
    for line in proc.text(os.path.join(root, CPUINFO)).splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return ""


def _line(root: str, path: str) -> str:
    return " ".join(proc.text(os.path.join(root, path)).split())
