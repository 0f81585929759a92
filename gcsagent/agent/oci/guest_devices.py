"""Devices that are said to be the guest's: their numbers, which only the guest knows, are put in.

An entry of ``linux.devices`` without a ``type`` is the guest's device at ``hostPath``, else at ``path``; the
container may use it as ``access`` (``rwm``) says, for which a rule follows those of ``linux.resources``.
"""

from __future__ import annotations

import os
import stat

from gcsagent.agent.oci.look import Json, invalid, not_found


def fill_in(spec: Json) -> None:
    """Raises NOT_FOUND or INVALID_ARGUMENT."""
    linux = spec.get("linux") or {}
    for index, device in enumerate(linux.get("devices") or ()):
        if device.get("type"):
            continue
        key = "hostPath" if device.get("hostPath") else "path"
        found = _look(device[key], f"spec.linux.devices[{index}].{key}")
        device.pop("hostPath", None)
        access = device.pop("access", None) or "rwm"
        for name, value in found.items():
            device.setdefault(name, value)
        rule = {"allow": True, "access": access} | {key: found[key] for key in ("type", "major", "minor")}
        resources = linux["resources"] = linux.get("resources") or {}
        resources["devices"] = [*(resources.get("devices") or ()), rule]


def _look(path: str, field: str) -> Json:
    try:
        info = os.stat(path)
    except OSError as error:
        raise not_found(field, f"{path} cannot be found in the guest: {error.strerror}") from error
    kinds = {stat.S_IFCHR: "c", stat.S_IFBLK: "b"}
    kind = kinds.get(stat.S_IFMT(info.st_mode))
    if kind is None:
        raise invalid(field, f"{path} is no device in the guest, and the entry has no 'type'")
    return {
        "type": kind,
        "major": os.major(info.st_rdev),
        "minor": os.minor(info.st_rdev),
        "fileMode": stat.S_IMODE(info.st_mode),
        "uid": info.st_uid,
        "gid": info.st_gid,
    }
