"""Hooks: programs the runtime runs at stages of a container's life (OCI runtime spec, config.md)."""

from __future__ import annotations

import os
import stat

from gcsagent.agent.inroot import find_program
from gcsagent.agent.oci.check_process import check_env
from gcsagent.agent.oci.look import Json, absolute, mapping, maps, not_found, number, texts
from protocol.errors import Code, RpcError

IN_GUEST = ("prestart", "createRuntime", "createContainer", "poststart", "poststop")
"""Kinds whose program is one of the guest's."""
IN_CONTAINER = "startContainer"
MAX_HOOKS = 64
MAX_TIMEOUT = 24 * 3600
"""Seconds."""


def check_hooks(spec: Json) -> None:
    hooks = mapping(spec.get("hooks"), "spec.hooks")
    for kind in (*IN_GUEST, IN_CONTAINER):
        for hook, where in maps(hooks.get(kind), f"spec.hooks.{kind}", MAX_HOOKS):
            path = absolute(hook.get("path"), f"{where}.path")
            texts(hook.get("args"), f"{where}.args")
            if hook.get("env") is not None:
                check_env(hook["env"], f"{where}.env")
            number(hook.get("timeout"), f"{where}.timeout", 1, MAX_TIMEOUT)
            verdict = _in_container(spec, path) if kind == IN_CONTAINER else _in_guest(path)
            _refuse(verdict, path, f"{where}.path", "container" if kind == IN_CONTAINER else "guest")


def _in_guest(path: str) -> str:
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return "not_found"
    return "" if stat.S_ISREG(mode) and mode & 0o111 else "not_executable"


def _in_container(spec: Json, path: str) -> str:
    """What a mount will bring cannot be seen yet, and is left to the runtime."""
    for mount in spec.get("mounts") or ():
        target = os.path.normpath(str(mount.get("destination")))
        if path == target or path.startswith(target.rstrip("/") + "/"):
            return ""
    return find_program(spec["root"]["path"], path, "", "/")


def _refuse(verdict: str, path: str, field: str, where: str) -> None:
    if verdict == "not_found":
        raise not_found(field, f"{path} does not exist in the {where}")
    if verdict == "not_executable":
        raise RpcError(
            Code.PERMISSION_DENIED, f"{field}: {path} is not an executable file in the {where}", field=field
        )
