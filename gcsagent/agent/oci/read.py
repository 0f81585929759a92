"""Reads a bundle's config.json, and gives relative paths the directory they are relative to."""

from __future__ import annotations

import json
import os
from typing import Any

from gcsagent.agent.oci.check_mounts import is_bind
from gcsagent.agent.oci.look import invalid, not_found

MAX_CONFIG = 4 << 20
"""Bytes of a config.json read from a bundle."""


def read_config(path: str) -> dict[str, Any]:
    """Raises NOT_FOUND or INVALID_ARGUMENT."""
    try:
        with open(path, "rb", opener=_open) as file:
            data = file.read(MAX_CONFIG + 1) or b""
    except FileNotFoundError as error:
        raise not_found("bundle", f"{path} does not exist in the guest") from error
    except OSError as error:
        raise invalid("bundle", f"{path}: {error.strerror}") from error
    if len(data) > MAX_CONFIG:
        raise invalid("bundle", f"{path} is larger than {MAX_CONFIG} bytes")
    try:
        spec = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise invalid("bundle", f"{path} is not JSON: {error}") from error
    if not isinstance(spec, dict):
        raise invalid("bundle", f"{path} is not a JSON object")
    return spec


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # nobody writes to a named pipe that a config.json may be


def make_absolute(spec: dict[str, Any], base: str) -> None:
    """Paths in a bundle are relative to it (OCI runtime spec, config.md); a bare spec has no base."""
    root = spec.get("root")
    if isinstance(root, dict) and isinstance(root.get("path"), str):
        root["path"] = _absolute(root["path"], base, "spec.root.path")
    mounts = spec.get("mounts")
    for index, mount in enumerate(mounts if isinstance(mounts, list) else []):
        source = mount.get("source") if isinstance(mount, dict) else None
        if isinstance(source, str) and source and is_bind(mount):
            mount["source"] = _absolute(source, base, f"spec.mounts[{index}].source")


def _absolute(path: str, base: str, field: str) -> str:
    if os.path.isabs(path):
        return path
    if not base:
        raise invalid(
            field, "must be an absolute path: a spec without a bundle has nothing to be relative to"
        )
    return os.path.normpath(os.path.join(base, path))
