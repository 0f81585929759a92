"""What ``gcsctl run``'s options make of the spec, after the habits of ``docker run``. Pure functions.

Field names and meaning: OCI Runtime Specification 1.0, config.md and config-linux.md.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gcsagent.host.spec import ALL, ALL_CAPABILITIES, CAPABILITIES, NAMESPACES

Json = dict[str, Any]
CPU_PERIOD_US = 100_000
"""The kernel's default (Documentation/scheduler/sched-bwc.rst)."""


@dataclass(frozen=True, slots=True)
class SpecOptions:
    """``None`` and empty leave the spec as it is. Lists hold OCI objects or what their names say."""

    cap_add: tuple[str, ...] = ()
    cap_drop: tuple[str, ...] = ()
    privileged: bool = False
    ulimits: tuple[Json, ...] = ()
    read_only: bool = False
    mounts: tuple[Json, ...] = ()
    devices: tuple[Json, ...] = ()
    sysctls: dict[str, str] = field(default_factory=dict)
    no_new_privileges: bool | None = None
    seccomp: Json | None = None
    apparmor: str = ""
    selinux: str = ""
    hostname: str = ""
    domainname: str = ""
    uid_mappings: tuple[Json, ...] = ()
    gid_mappings: tuple[Json, ...] = ()
    shared: tuple[str, ...] = ()
    """Kinds of namespaces that stay the guest's."""
    cgroups_path: str = ""
    memory: int | None = None
    cpus: float | None = None
    pids: int | None = None
    shm_size: int | None = None
    oom_score_adj: int | None = None


def apply(spec: Json, options: SpecOptions) -> Json:
    """``spec`` (as :func:`gcsagent.host.spec.container_spec` makes it) with ``options`` carried out."""
    made = copy.deepcopy(spec)
    _apply_process(made["process"], options)
    _apply_namespaces(made, options)
    _apply_mounts(made, options)
    _apply_resources(made["linux"], options)
    linux = made["linux"]
    if options.privileged:
        _lift_confinement(made)
    if options.read_only:
        made["root"]["readonly"] = True
    if options.devices:
        linux["devices"] = list(options.devices)
    if options.sysctls:
        linux["sysctl"] = dict(options.sysctls)
    if options.seccomp is not None:
        linux["seccomp"] = options.seccomp
    if options.selinux:
        linux["mountLabel"] = options.selinux
    if options.cgroups_path:
        linux["cgroupsPath"] = options.cgroups_path
    return made


def capabilities(add: Sequence[str], drop: Sequence[str], privileged: bool = False) -> list[str]:
    """What is granted, by full names and ``ALL``, joined as by docker: a drop wins, but not that of all."""
    if privileged or (ALL in add and not drop):
        return [ALL]
    if ALL in add:
        return [name for name in ALL_CAPABILITIES if name not in drop]
    granted = [] if ALL in drop else [name for name in CAPABILITIES if name not in drop]
    return granted + [name for name in dict.fromkeys(add) if name not in granted]


def _apply_process(process: Json, options: SpecOptions) -> None:
    if options.cap_add or options.cap_drop or options.privileged:
        granted = capabilities(options.cap_add, options.cap_drop, options.privileged)
        process["capabilities"] = dict.fromkeys(("bounding", "effective", "permitted"), granted)
    if options.privileged:
        process["noNewPrivileges"] = False
    if options.no_new_privileges is not None:
        process["noNewPrivileges"] = options.no_new_privileges
    given = {limit["type"] for limit in options.ulimits}
    kept = [limit for limit in process["rlimits"] if limit["type"] not in given]
    process["rlimits"] = [*kept, *options.ulimits]
    if options.apparmor:
        process["apparmorProfile"] = options.apparmor
    if options.selinux:
        process["selinuxLabel"] = options.selinux
    if options.oom_score_adj is not None:
        process["oomScoreAdj"] = options.oom_score_adj


def _apply_namespaces(spec: Json, options: SpecOptions) -> None:
    linux = spec["linux"]
    kinds = [kind for kind in NAMESPACES if kind not in options.shared]
    if "uts" in options.shared:
        del spec["hostname"]
    if options.hostname:
        spec["hostname"] = options.hostname
    if options.domainname:
        spec["domainname"] = options.domainname
    if options.uid_mappings:
        kinds.append("user")
        linux["uidMappings"] = list(options.uid_mappings)
        linux["gidMappings"] = list(options.gid_mappings)
    linux["namespaces"] = [{"type": kind} for kind in kinds]


def _apply_mounts(spec: Json, options: SpecOptions) -> None:
    """One of the caller's takes the place of ours at the same destination."""
    taken = {mount["destination"] for mount in options.mounts}
    mounts = [mount for mount in spec["mounts"] if mount["destination"] not in taken]
    if "network" in options.shared and options.uid_mappings:
        # A sysfs shows a network namespace, and can be mounted only by the owner of that.
        mounts = [_bound_sysfs(mount) if mount["type"] == "sysfs" else mount for mount in mounts]
    for mount in mounts:
        if mount["destination"] == "/dev/shm" and options.shm_size is not None:
            kept = [option for option in mount["options"] if not option.startswith("size=")]
            mount["options"] = [*kept, f"size={options.shm_size}"]
    spec["mounts"] = mounts + list(options.mounts)


def _bound_sysfs(mount: Json) -> Json:
    options = ["rbind", *mount.get("options", [])]
    return {**mount, "type": "none", "source": "/sys", "options": options}


def _apply_resources(linux: Json, options: SpecOptions) -> None:
    resources = linux["resources"]
    if options.memory is not None:
        resources["memory"] = {"limit": options.memory}
    if options.cpus is not None:
        resources["cpu"] = {"period": CPU_PERIOD_US, "quota": round(options.cpus * CPU_PERIOD_US)}
    if options.pids is not None:
        resources["pids"] = {"limit": options.pids}


def _lift_confinement(spec: Json) -> None:
    """Everything the guest's root may do, except what a namespace of its own keeps it from."""
    linux = spec["linux"]
    linux["resources"]["devices"] = [{"allow": True, "access": "rwm"}]
    linux["maskedPaths"] = linux["readonlyPaths"] = []
    for mount in spec["mounts"]:
        if mount["type"] in ("sysfs", "cgroup"):
            mount["options"] = [option for option in mount["options"] if option != "ro"]
