"""From what a host asked for to the config.json the runtime gets, and to the process.json of an exec.

The host's own bundle is never written to: the container's state directory is the bundle runc sees, with
relative paths made absolute against the directory they came from. The steps are :mod:`gcsagent.agent.oci`'s.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from gcsagent.agent import seccomp, seccomp_splice
from gcsagent.agent.oci import guest_devices, users
from gcsagent.agent.oci.capabilities import expand_all
from gcsagent.agent.oci.check import check_spec
from gcsagent.agent.oci.check_namespaces import check_mapped
from gcsagent.agent.oci.check_process import check_capabilities, check_process
from gcsagent.agent.oci.look import copied, invalid
from gcsagent.agent.oci.read import make_absolute, read_config
from protocol.errors import Code, RpcError
from protocol.families.container import CreateContainer
from protocol.families.process import Exec
from protocol.types import Stdio


def load(params: CreateContainer, adapt: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """The OCI spec asked for, checked, with absolute paths and numbers for names, and changed by ``adapt``.

    Raises INVALID_ARGUMENT, NOT_FOUND or PERMISSION_DENIED, naming the field.
    """
    if (params.spec is None) == (params.bundle is None):
        raise invalid("spec", "give exactly one of 'spec' and 'bundle'")
    if params.bundle is not None:
        spec = read_config(os.path.join(params.bundle, "config.json"))
        make_absolute(spec, params.bundle)
    else:
        assert params.spec is not None
        spec = copied(params.spec)
        make_absolute(spec, "")
    check_spec(spec)
    if adapt is not None:
        adapt(spec)
    _settle_user(spec["process"], "spec.process", spec["root"]["path"])
    check_mapped(spec)
    expand_all(spec["process"])
    _set_domainname(spec)
    guest_devices.fill_in(spec)
    return spec if params.allow_vsock else seccomp_splice.spare_pipes(seccomp.deny_vsock(spec))


def finish(spec: dict[str, Any], stdio: Stdio, cgroups_path: str) -> dict[str, Any]:
    """The spec with what is the agent's to say: terminal, cgroup, protection from the agent's own OOM score.

    oom_score_adj is inherited, and agent and runtime run protected: a container always gets its own.
    """
    process = spec["process"]
    set_terminal(process, stdio)
    if process.get("oomScoreAdj") is None:
        process["oomScoreAdj"] = 0
    spec["linux"] = {**(spec.get("linux") or {}), "cgroupsPath": cgroups_path}
    return spec


def set_terminal(process: dict[str, Any], stdio: Stdio) -> None:
    process["terminal"] = stdio.terminal
    process.pop("consoleSize", None)
    if stdio.terminal:
        process["consoleSize"] = {"height": stdio.winsize.rows, "width": stdio.winsize.cols}


def for_exec(container: dict[str, Any], params: Exec, root: str) -> dict[str, Any]:
    """The OCI process object of an exec: the container's own, with what was asked for put over it.

    ``container`` is the container's spec, ``root`` its root directory as the agent sees it. Raises
    INVALID_ARGUMENT or NOT_FOUND, naming the field.
    """
    process, wanted = copied(container["process"]), copied(params.spec)
    inherited_env, inherited_user = process.pop("env", None) or [], process.get("user")
    process.update({key: value for key, value in wanted.items() if key != "terminal"})
    if "args" not in wanted:
        raise invalid("spec.args", "is missing: what shall be executed?")
    check_process(process, "spec")
    process["user"] = _user_of_exec(process["user"], inherited_user)
    process["env"] = _merge_env(inherited_env, process["env"])
    _settle_user(process, "spec", root)
    _add_capabilities(process, params.add_capabilities)
    expand_all(process)
    set_terminal(process, params.stdio)
    return dict(process)


def _user_of_exec(wanted: dict[str, Any], inherited: dict[str, Any]) -> dict[str, Any]:
    """Groups alone are further ones of the container's own user."""
    if "uid" in wanted or wanted.get("username"):
        return wanted
    groups = [*(wanted.get("additionalGids") or ()), *(inherited.get("additionalGids") or ())]
    return {**inherited, **wanted, "additionalGids": list(dict.fromkeys(groups))}


def _add_capabilities(process: dict[str, Any], added: tuple[str, ...]) -> None:
    check_capabilities(added, "add_capabilities")
    if not added:
        return
    sets = process["capabilities"] = dict(process.get("capabilities") or {})
    for kind in ("bounding", "effective", "permitted"):
        sets[kind] = list(dict.fromkeys([*(sets.get(kind) or ()), *added]))


def owns_pid_namespace(spec: dict[str, Any]) -> bool:
    return any(
        isinstance(namespace, dict) and namespace.get("type") == "pid" and not namespace.get("path")
        for namespace in (spec.get("linux") or {}).get("namespaces") or ()
    )


def _settle_user(process: dict[str, Any], where: str, root: str) -> None:
    if not users.has_names(process):
        process["user"].pop("username", None)
        return
    try:
        directory = users.open_root(root)
    except OSError as error:
        raise RpcError(Code.FAILED_PRECONDITION, f"{root} cannot be looked into: {error.strerror}") from error
    try:
        users.settle_user(process, where, directory)
    finally:
        os.close(directory)


def _set_domainname(spec: dict[str, Any]) -> None:
    """runc learnt the field in 1.2; the sysctl does the same, in every version."""
    if spec.get("domainname"):
        linux = spec["linux"]
        linux["sysctl"] = {"kernel.domainname": spec["domainname"], **(linux.get("sysctl") or {})}


def _merge_env(base: list[str], added: list[str]) -> list[str]:
    merged = {entry.partition("=")[0]: entry for entry in base}
    merged.update({entry.partition("=")[0]: entry for entry in added})
    return list(merged.values())
