"""Everything that is checked of a spec before the runtime sees it. Raises INVALID_ARGUMENT or NOT_FOUND."""

from __future__ import annotations

import os

from gcsagent.agent.oci.check_devices import check_devices, check_resources
from gcsagent.agent.oci.check_hooks import check_hooks
from gcsagent.agent.oci.check_mounts import check_mounts
from gcsagent.agent.oci.check_namespaces import check_namespaces, check_sysctls, namespaces_of
from gcsagent.agent.oci.check_process import check_process
from gcsagent.agent.oci.check_seccomp import check_seccomp
from gcsagent.agent.oci.look import Json, absolute, choice, flag, invalid, mapping, not_found, text
from gcsagent.agent.oci.names import PROPAGATIONS

NAME_MAX = 64
"""Bytes of a host or domain name: the kernel's __NEW_UTS_LEN."""


def check_spec(spec: Json) -> None:
    if not isinstance(spec.get("ociVersion"), str):
        raise invalid("spec.ociVersion", "is missing; '1.0.2' is what runc 1.1 implements")
    for other in ("windows", "vm", "solaris", "zos"):
        if spec.get(other) is not None:
            raise invalid(f"spec.{other}", "is for another kind of container; these are Linux ones")
    _check_root(spec)
    if not isinstance(spec.get("process"), dict):
        raise invalid("spec.process", "must be a map")
    linux = mapping(spec.get("linux"), "spec.linux")
    check_process(spec["process"], "spec.process")
    mapping(spec.get("annotations"), "spec.annotations")
    namespaces = namespaces_of(linux)
    check_namespaces(linux)
    _check_names(spec, namespaces)
    check_mounts(spec, namespaces)
    check_hooks(spec)
    check_sysctls(linux, namespaces)
    check_devices(linux)
    check_resources(linux)
    check_seccomp(linux)
    _check_paths(linux, namespaces)


def _check_root(spec: Json) -> None:
    root = spec.get("root")
    if not isinstance(root, dict) or not isinstance(root.get("path"), str):
        raise invalid("spec.root.path", "must name the container's root directory in the guest")
    flag(root.get("readonly"), "spec.root.readonly")
    if not os.path.isdir(root["path"]):
        raise not_found("spec.root.path", f"{root['path']} is not a directory in the guest")


def _check_names(spec: Json, namespaces: dict[str, str]) -> None:
    for key in ("hostname", "domainname"):
        name = text(spec.get(key), f"spec.{key}")
        if len(name.encode()) > NAME_MAX:
            raise invalid(f"spec.{key}", f"has more than {NAME_MAX} bytes")
        if name and "uts" not in namespaces:
            raise invalid(f"spec.{key}", "needs a 'uts' namespace in spec.linux.namespaces")


def _check_paths(linux: Json, namespaces: dict[str, str]) -> None:
    for key in ("maskedPaths", "readonlyPaths"):
        field = f"spec.linux.{key}"
        paths = linux.get(key)
        if paths and "mount" not in namespaces:
            raise invalid(field, "needs a 'mount' namespace in spec.linux.namespaces")
        if paths is not None and not isinstance(paths, list):
            raise invalid(field, "must be an array of paths")
        for index, path in enumerate(paths or ()):
            absolute(path, f"{field}[{index}]")
    if linux.get("rootfsPropagation"):
        choice(linux["rootfsPropagation"], "spec.linux.rootfsPropagation", PROPAGATIONS, "propagation")
    text(linux.get("mountLabel"), "spec.linux.mountLabel")
    text(linux.get("cgroupsPath"), "spec.linux.cgroupsPath")
