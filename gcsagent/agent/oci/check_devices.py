"""Devices, and the limits of the cgroup."""

from __future__ import annotations

from typing import Any

from gcsagent.agent.oci.check_process import MAX_ID
from gcsagent.agent.oci.look import (
    I64,
    U32,
    U64,
    Json,
    absolute,
    choice,
    flag,
    invalid,
    mapping,
    maps,
    number,
    required,
    text,
)

UNLIMITED = -1

_NUMBERS: dict[str, dict[str, tuple[int, int]]] = {
    "memory": {
        **dict.fromkeys(("limit", "reservation", "swap", "kernel", "kernelTCP"), (UNLIMITED, I64)),
        "swappiness": (0, 100),
    },
    "cpu": {
        "shares": (0, U64),
        "quota": (UNLIMITED, I64),
        "burst": (0, U64),
        "period": (0, U64),
        "realtimeRuntime": (UNLIMITED, I64),
        "realtimePeriod": (0, U64),
    },
    "pids": {"limit": (UNLIMITED, I64)},
    "blockIO": {"weight": (0, 1000), "leafWeight": (0, 1000)},
    "network": {"classID": (0, U32)},
}
"""What is a number, and from where to where: -1 stands for no limit."""


def check_resources(linux: Json) -> None:
    where = "spec.linux.resources"
    resources = mapping(linux.get("resources"), where)
    for kind, numbers in _NUMBERS.items():
        group = mapping(resources.get(kind), f"{where}.{kind}")
        for key, (low, high) in numbers.items():
            number(group.get(key), f"{where}.{kind}.{key}", low, high)
    cpu = mapping(resources.get("cpu"), f"{where}.cpu")
    for key in ("cpus", "mems"):
        text(cpu.get(key), f"{where}.cpu.{key}")
    for limit, field in maps(resources.get("hugepageLimits"), f"{where}.hugepageLimits"):
        text(limit.get("pageSize"), f"{field}.pageSize")
        required(limit.get("limit", 0), f"{field}.limit", 0, U64)
    for key, value in mapping(resources.get("unified"), f"{where}.unified").items():
        if "/" in key or key.startswith("cgroup."):
            raise invalid(f"{where}.unified.{key}", "is no controller's file")
        text(value, f"{where}.unified.{key}")
    for rule, field in maps(resources.get("devices"), f"{where}.devices"):
        _check_rule(rule, field)


def _check_rule(rule: Json, field: str) -> None:
    flag(rule.get("allow"), f"{field}.allow")
    if rule.get("type"):
        choice(rule["type"], f"{field}.type", ("a", "b", "c", "p", "u"), "type of device")
    for key in ("major", "minor"):
        number(rule.get(key), f"{field}.{key}", -1, U32)
    _check_access(rule, field)


def _check_access(rule: Json, field: str) -> None:
    access = text(rule.get("access"), f"{field}.access")
    if set(access) - set("rwm"):
        raise invalid(f"{field}.access", "must be letters out of 'rwm'")


def check_devices(linux: Json) -> None:
    for device, where in maps(linux.get("devices"), "spec.linux.devices"):
        absolute(device.get("path"), f"{where}.path")
        if not device.get("type"):
            _check_guest_device(device, where)
            continue
        kind = choice(device.get("type"), f"{where}.type", ("b", "c", "p", "u"), "type of device")
        for key in ("major", "minor"):
            value: Any = device.get(key)
            if kind == "p":
                number(value, f"{where}.{key}", 0, U32)
            else:
                required(value if value is not None else 0, f"{where}.{key}", 0, U32)
        number(device.get("fileMode"), f"{where}.fileMode", 0, 0o177777)
        for key in ("uid", "gid"):
            number(device.get(key), f"{where}.{key}", 0, MAX_ID)


def _check_guest_device(device: Json, where: str) -> None:
    """One that guest_devices completes."""
    if device.get("hostPath") is not None:
        absolute(device["hostPath"], f"{where}.hostPath")
    _check_access(device, where)
