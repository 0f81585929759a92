"""Mounts: what must be there before the runtime binds it, and what cannot be mounted at all."""

from __future__ import annotations

import os

from gcsagent.agent.oci.look import Json, absolute, invalid, maps, not_found, text, texts


def check_mounts(spec: Json, namespaces: dict[str, str]) -> None:
    for mount, where in maps(spec.get("mounts"), "spec.mounts"):
        absolute(mount.get("destination"), f"{where}.destination")
        text(mount.get("type"), f"{where}.type")
        source = text(mount.get("source"), f"{where}.source")
        options = texts(mount.get("options"), f"{where}.options")
        for index, option in enumerate(options):
            if not option:
                raise invalid(f"{where}.options[{index}]", "is empty")
        # In a mount namespace of somebody else's the source is looked up there.
        if is_bind(mount) and not namespaces.get("mount"):
            _check_source(source, f"{where}.source")


def is_bind(mount: Json) -> bool:
    """The options decide: with 'bind' or 'rbind' the type is ignored (OCI runtime spec, config-linux.md)."""
    options = mount.get("options")
    return mount.get("type") == "bind" or (
        isinstance(options, list) and ("bind" in options or "rbind" in options)
    )


def _check_source(source: str, field: str) -> None:
    if not source:
        raise invalid(field, "is missing: what shall be bound?")
    if not os.path.lexists(source) or not os.path.exists(source):
        raise not_found(field, f"{source} does not exist in the guest")
