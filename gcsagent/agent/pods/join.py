"""Into a pod's namespaces: what a container's spec says of them, and that it has got there."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from gcsagent.agent.oci.look import invalid
from protocol.errors import Code, RpcError
from protocol.pods import PodNamespace

FILES = {
    PodNamespace.NETWORK: "net",
    PodNamespace.IPC: "ipc",
    PodNamespace.UTS: "uts",
    PodNamespace.PID: "pid",
    PodNamespace.USER: "user",
}
"""Names in /proc/PID/ns (namespaces(7))."""

Json = dict[str, Any]
Identities = dict[str, list[int]]
"""Device and inode number of a namespace, which are what it is known by, by kind."""


def identities(pid: int, kinds: Iterable[PodNamespace]) -> Identities:
    """Raises OSError."""
    found = {}
    for kind in kinds:
        status = os.stat(path_of(pid, kind))
        found[kind.value] = [status.st_dev, status.st_ino]
    return found


def path_of(pid: int, kind: PodNamespace) -> str:
    return f"/proc/{pid}/ns/{FILES[kind]}"


def rewrite(spec: Json, pid: int, kinds: Iterable[PodNamespace]) -> None:
    """Has ``spec`` join the namespaces of ``pid``. Raises INVALID_ARGUMENT for what contradicts that.

    Host and domain name are the pod's: a runtime would set a joined namespace's, for all in it.
    """
    linux = spec["linux"] = dict(spec.get("linux") or {})
    namespaces = list(linux.get("namespaces") or ())
    for kind in kinds:
        for index, entry in enumerate(namespaces):
            if entry.get("type") == kind.value and entry.get("path"):
                raise invalid(
                    f"spec.linux.namespaces[{index}].path",
                    f"the {kind.value} namespace is to be the pod's; leave the path out, or do not share it",
                )
        namespaces = [entry for entry in namespaces if entry.get("type") != kind.value]
        namespaces.append({"type": kind.value, "path": path_of(pid, kind)})
    linux["namespaces"] = namespaces
    if PodNamespace.UTS in kinds:
        spec.pop("hostname", None)
        spec.pop("domainname", None)


def check_joined(sandbox: str, pid: int, wanted: Identities) -> None:
    """Raises FAILED_PRECONDITION where ``pid``, which the runtime has made, is elsewhere.

    The path given to it named a process by its number, which may have been another's by then.
    """
    kinds = [PodNamespace(kind) for kind in wanted]
    try:
        there = identities(pid, kinds)
    except OSError as error:
        raise gone(sandbox, {}) from error
    if there != wanted:
        raise gone(sandbox, {})


def gone(sandbox: str, details: Json) -> RpcError:
    """The sandbox has ended while its namespaces were being joined; ``details`` are of what came of that."""
    words = f"pod.sandbox: {sandbox} has ended meanwhile, or the container has; create a sandbox anew"
    return RpcError(Code.FAILED_PRECONDITION, words, **{**details, "field": "pod.sandbox"})
