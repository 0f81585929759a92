"""Where a container's cgroup goes: a path of the caller's, always below the agent's own."""

from __future__ import annotations

from gcsagent.agent.oci.look import Json, invalid, text

FIELD = "spec.linux.cgroupsPath"
MAX_DEPTH = 16
MAX_NAME = 255
"""Bytes of one directory's name, NAME_MAX."""


def wanted(spec: Json) -> str:
    """The spec's path, relative to the agent's cgroup and without rubbish; ``""`` if it has none.

    Raises INVALID_ARGUMENT.
    """
    path = text((spec.get("linux") or {}).get("cgroupsPath"), FIELD)
    if not path:
        return ""
    if path.count(":") == 2 and "/" not in path:
        raise invalid(FIELD, f"{path!r} is systemd's SLICE:PREFIX:NAME; give a path, like pods/p1/c1")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if not parts:
        raise invalid(FIELD, f"{path!r} names no cgroup below the agent's own; give a path, like pods/p1/c1")
    if ".." in parts:
        raise invalid(FIELD, "must not have '..': a container's cgroup is below the agent's own")
    if len(parts) > MAX_DEPTH:
        raise invalid(FIELD, f"is {len(parts)} levels deep; {MAX_DEPTH} are allowed")
    for part in parts:
        if len(part.encode()) > MAX_NAME or any(ord(character) < 32 for character in part):
            raise invalid(FIELD, f"{part[:64]!r} is no name for a directory")
        if part.startswith("cgroup."):
            raise invalid(FIELD, f"{part!r} is a name that the kernel has taken for a file")
    return "/".join(parts)
