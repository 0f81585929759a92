"""From what a host asked for to the config.json the runtime gets.

The host's own bundle is never written to: the container's state directory is the bundle runc sees, with
relative paths made absolute against the directory they came from.
"""

from __future__ import annotations

import copy
import json
import os
from typing import Any

from gcsagent.agent import seccomp
from protocol.errors import Code, RpcError
from protocol.families.container import CreateContainer
from protocol.types import Stdio

MAX_CONFIG = 4 << 20
"""Bytes of a config.json read from a bundle."""


def load(params: CreateContainer) -> dict[str, Any]:
    """The OCI spec asked for, checked, with absolute paths. Raises INVALID_ARGUMENT or NOT_FOUND."""
    if (params.spec is None) == (params.bundle is None):
        raise invalid("spec", "give exactly one of 'spec' and 'bundle'")
    if params.bundle is not None:
        spec = _read(os.path.join(params.bundle, "config.json"))
        _make_absolute(spec, params.bundle)
    else:
        assert params.spec is not None
        spec = copy.deepcopy(params.spec)
        _make_absolute(spec, "")
    _check(spec)
    return spec if params.allow_vsock else seccomp.deny_vsock(spec)


def finish(spec: dict[str, Any], stdio: Stdio, cgroups_path: str) -> dict[str, Any]:
    """The spec with what is the agent's to say: terminal, cgroup, protection from the agent's own OOM score.

    oom_score_adj is inherited, and agent and runtime run protected: a container always gets its own.
    """
    process = spec["process"]
    set_terminal(process, stdio)
    if process.get("oomScoreAdj") is None:
        process["oomScoreAdj"] = 0
    spec.setdefault("linux", {})["cgroupsPath"] = cgroups_path
    return spec


def set_terminal(process: dict[str, Any], stdio: Stdio) -> None:
    process["terminal"] = stdio.terminal
    process.pop("consoleSize", None)
    if stdio.terminal:
        process["consoleSize"] = {"height": stdio.winsize.rows, "width": stdio.winsize.cols}


def for_exec(container: dict[str, Any], wanted: dict[str, Any], stdio: Stdio) -> dict[str, Any]:
    """The OCI process object of an exec: the container's own, with what was asked for put over it.

    ``container`` is the container's spec. Raises INVALID_ARGUMENT naming the field.
    """
    process = copy.deepcopy(container["process"])
    inherited_env = process.pop("env", [])
    process.update({key: value for key, value in wanted.items() if key != "terminal"})
    if "args" not in wanted:
        raise invalid("spec.args", "is missing: what shall be executed?")
    _check_process(process, "spec")
    process["env"] = _merge_env(inherited_env, process.get("env", []))
    set_terminal(process, stdio)
    return dict(process)


def owns_pid_namespace(spec: dict[str, Any]) -> bool:
    return any(
        isinstance(namespace, dict) and namespace.get("type") == "pid" and not namespace.get("path")
        for namespace in spec.get("linux", {}).get("namespaces", [])
    )


def invalid(field: str, problem: str) -> RpcError:
    return RpcError(Code.INVALID_ARGUMENT, f"{field}: {problem}", field=field)


def _read(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_CONFIG + 1)
    except FileNotFoundError as error:
        raise RpcError(
            Code.NOT_FOUND, f"bundle: {path} does not exist in the guest", field="bundle"
        ) from error
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


def _make_absolute(spec: dict[str, Any], base: str) -> None:
    """Paths in a bundle are relative to it (OCI runtime spec, config.md); a bare spec has no base."""
    root = spec.get("root")
    if isinstance(root, dict) and isinstance(root.get("path"), str):
        root["path"] = _absolute(root["path"], base, "spec.root.path")
    mounts = spec.get("mounts")
    for index, mount in enumerate(mounts if isinstance(mounts, list) else []):
        if isinstance(mount, dict) and _is_bind(mount) and isinstance(mount.get("source"), str):
            mount["source"] = _absolute(mount["source"], base, f"spec.mounts[{index}].source")


def _is_bind(mount: dict[str, Any]) -> bool:
    """The options decide: with 'bind' or 'rbind' the type is ignored (OCI runtime spec, config-linux.md)."""
    options = mount.get("options")
    return mount.get("type") == "bind" or (
        isinstance(options, list) and ("bind" in options or "rbind" in options)
    )


def _absolute(path: str, base: str, field: str) -> str:
    if os.path.isabs(path):
        return path
    if not base:
        raise invalid(
            field, "must be an absolute path: a spec without a bundle has nothing to be relative to"
        )
    return os.path.normpath(os.path.join(base, path))


def _check(spec: dict[str, Any]) -> None:
    if not isinstance(spec.get("ociVersion"), str):
        raise invalid("spec.ociVersion", "is missing; '1.0.2' is what runc 1.1 implements")
    root = spec.get("root")
    if not isinstance(root, dict) or not isinstance(root.get("path"), str):
        raise invalid("spec.root.path", "must name the container's root directory in the guest")
    if not os.path.isdir(root["path"]):
        raise RpcError(
            Code.NOT_FOUND,
            f"spec.root.path: {root['path']} is not a directory in the guest",
            field="spec.root.path",
        )
    if not isinstance(spec.get("process"), dict):
        raise invalid("spec.process", "must be a map")
    if not isinstance(spec.get("linux", {}), dict):
        raise invalid("spec.linux", "must be a map")
    _check_process(spec["process"], "spec.process")


def _check_process(process: dict[str, Any], where: str) -> None:
    args = _strings(process.get("args"), f"{where}.args")
    if not args or not args[0]:
        raise invalid(f"{where}.args", "must name the program to execute")
    cwd = process.setdefault("cwd", "/")
    if not isinstance(cwd, str) or not cwd.startswith("/") or "\0" in cwd:
        raise invalid(f"{where}.cwd", "must be an absolute path in the container")
    for index, entry in enumerate(_strings(process.get("env", []), f"{where}.env")):
        if "=" not in entry[1:]:
            raise invalid(f"{where}.env[{index}]", "must be NAME=VALUE")
    process.setdefault("user", {"uid": 0, "gid": 0})


def _strings(value: Any, field: str) -> list[str]:
    if not isinstance(value, list):
        raise invalid(field, "must be an array of strings")
    for index, item in enumerate(value):
        if not isinstance(item, str) or "\0" in item:
            raise invalid(f"{field}[{index}]", "must be a string without NUL bytes")
    return value


def _merge_env(base: list[str], added: list[str]) -> list[str]:
    merged = {entry.partition("=")[0]: entry for entry in base}
    merged.update({entry.partition("=")[0]: entry for entry in added})
    return list(merged.values())
