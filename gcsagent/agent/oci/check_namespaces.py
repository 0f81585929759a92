"""Namespaces, the id mappings of a user namespace, and the sysctls that belong to namespaces."""

from __future__ import annotations

import os
from typing import Any

from gcsagent.agent.oci.look import U32, Json, choice, invalid, mapping, maps, not_found, required, text
from gcsagent.agent.oci.names import IPC_SYSCTLS, NAMESPACES

MAX_MAPPINGS = 340
"""Lines of /proc/PID/uid_map, user_namespaces(7)."""


def namespaces_of(linux: Json) -> dict[str, str]:
    """The namespaces that differ from the guest's: kind to the path of one to join, ``""`` for a new one."""
    found: dict[str, str] = {}
    for entry, where in maps(linux.get("namespaces"), "spec.linux.namespaces"):
        kind = choice(entry.get("type"), f"{where}.type", NAMESPACES, "namespace")
        if kind in found:
            raise invalid(f"{where}.type", f"{kind} is there twice")
        path = text(entry.get("path"), f"{where}.path")
        if path and not path.startswith("/"):
            raise invalid(f"{where}.path", "must be an absolute path")
        if path and not os.path.exists(path):
            raise not_found(f"{where}.path", f"{path} does not exist in the guest")
        found[kind] = path
    return found


def check_namespaces(linux: Json) -> None:
    """The mappings: there with a user namespace, and only then."""
    namespaces = namespaces_of(linux)
    fresh = namespaces.get("user") == ""
    for key in ("uidMappings", "gidMappings"):
        field = f"spec.linux.{key}"
        mappings = _mappings(linux.get(key), field)
        if mappings and "user" not in namespaces:
            raise invalid(field, "needs a 'user' namespace in spec.linux.namespaces")
        if fresh and not any(first == 0 for first, _, _ in mappings):
            raise invalid(field, "must map the container's id 0: a new user namespace has no ids of its own")


def check_mapped(spec: Json) -> None:
    """The process's ids, once they are numbers, are among those that are mapped."""
    linux, user = spec.get("linux") or {}, spec["process"]["user"]
    for key, name in (("uidMappings", "uid"), ("gidMappings", "gid")):
        field = f"spec.linux.{key}"
        mappings, wanted = _mappings(linux.get(key), field), user.get(name) or 0
        if mappings and to_guest(mappings, wanted) is None:
            raise invalid(f"spec.process.user.{name}", f"{wanted} is not among the ids that {field} maps")


def _mappings(value: Any, field: str) -> list[tuple[int, int, int]]:
    found = []
    for entry, where in maps(value, field, MAX_MAPPINGS):
        first, outside = (
            required(entry.get(key, 0), f"{where}.{key}", 0, U32 - 1) for key in ("containerID", "hostID")
        )
        size = required(entry.get("size"), f"{where}.size", 1, U32)
        if max(first, outside) + size > U32:
            raise invalid(f"{where}.size", "goes beyond the last id there is")
        found.append((first, outside, size))
    return found


def to_guest(mappings: list[tuple[int, int, int]], ident: int) -> int | None:
    """The guest's number for a container's id; None when it has none."""
    for first, outside, size in mappings:
        if first <= ident < first + size:
            return outside + ident - first
    return None


def mapped_root(spec: Json) -> tuple[int, int] | None:
    """The guest's uid and gid of root in the container's user namespace; None without one."""
    linux = spec.get("linux") or {}
    if "user" not in {entry.get("type") for entry in linux.get("namespaces") or ()}:
        return None
    uid, gid = (
        to_guest(_mappings(linux.get(key), f"spec.linux.{key}"), 0) for key in ("uidMappings", "gidMappings")
    )
    return None if uid is None or gid is None else (uid, gid)


def check_sysctls(linux: Json, namespaces: dict[str, str]) -> None:
    """Which belong to which namespace: namespaces(7), sysctl(8)'s two spellings of a key included."""
    sysctls = mapping(linux.get("sysctl"), "spec.linux.sysctl")
    for key, value in sysctls.items():
        field = f"spec.linux.sysctl.{key}"
        if not isinstance(value, str):
            raise invalid(field, "must be a string, numbers too")
        text(value, field)
        kind = sysctl_kind(key)
        if not kind:
            raise invalid(field, "belongs to no namespace, it is one for the whole guest")
        if kind not in namespaces:
            raise invalid(field, f"needs a {kind!r} namespace in spec.linux.namespaces")
        if key == "kernel.hostname":
            raise invalid(field, "is set by spec.hostname")


def sysctl_kind(key: str) -> str:
    """The namespace it belongs to, ``""`` for none."""
    key = key if "." in key.split("/")[0] else key.replace("/", ".")
    if key in IPC_SYSCTLS or key.startswith("fs.mqueue."):
        return "ipc"
    if key.startswith("net."):
        return "network"
    return "uts" if key in ("kernel.hostname", "kernel.domainname") else ""
