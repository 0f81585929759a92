"""Seccomp profiles as people have them in files: the OCI form, or the engines' form with conditions.

The engines' form (moby's profiles/seccomp/default.json, containers/common) adds ``archMap`` and, per rule,
``includes`` and ``excludes`` by capability, architecture and kernel, which are decided here.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

Json = dict[str, Any]
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_KERNEL = re.compile(r"([0-9]+)\.([0-9]+)")


def to_oci(profile: Any, machine: str, capabilities: Collection[str], kernel: str = "6.12") -> Json:
    """``profile`` as ``linux.seccomp``. ``machine`` is as ``uname -m`` says it, the guest's.

    Raises ValueError with what is wrong.
    """
    if not isinstance(profile, dict) or not isinstance(profile.get("defaultAction"), str):
        raise ValueError("is no seccomp profile: it must be an object with a 'defaultAction'")
    made = {key: value for key, value in profile.items() if key not in ("archMap", "syscalls")}
    if "archMap" in profile:
        made["architectures"] = _architectures(profile["archMap"], machine)
    rules = profile.get("syscalls") or []
    if not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
        raise ValueError("has 'syscalls' that are not an array of objects")
    facts = {_ARCHITECTURES.get(machine, machine)}, set(capabilities), _version(kernel)
    made["syscalls"] = [_plain(rule) for rule in rules if _applies(rule, *facts)]
    return made


def _architectures(mapped: Any, machine: str) -> list[str]:
    wanted = f"SCMP_ARCH_{machine.upper()}"
    for entry in mapped if isinstance(mapped, list) else ():
        if isinstance(entry, dict) and entry.get("architecture") == wanted:
            return [wanted, *(entry.get("subArchitectures") or [])]
    raise ValueError(f"has no 'archMap' entry for {wanted}")


def _applies(rule: Json, machine: set[str], granted: set[str], kernel: tuple[int, int]) -> bool:
    includes, excludes = rule.get("includes") or {}, rule.get("excludes") or {}
    if not set(includes.get("caps") or ()) <= granted or set(excludes.get("caps") or ()) & granted:
        return False
    if includes.get("arches") and not machine & set(includes["arches"]):
        return False
    if machine & set(excludes.get("arches") or ()):
        return False
    if includes.get("minKernel") and kernel < _version(includes["minKernel"]):
        return False
    return not (excludes.get("minKernel") and kernel >= _version(excludes["minKernel"]))


def _plain(rule: Json) -> Json:
    kept = {key: value for key, value in rule.items() if key in ("names", "action", "args", "errnoRet")}
    if "names" not in kept and isinstance(rule.get("name"), str):
        kept["names"] = [rule["name"]]
    return kept


def _version(text: Any) -> tuple[int, int]:
    match = _KERNEL.match(str(text))
    if match is None:
        raise ValueError(f"has a 'minKernel' {text!r} that is no version")
    return int(match[1]), int(match[2])
