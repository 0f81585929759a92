"""The files a pod's containers share, in its sandbox's directory: those for /etc, and /dev/shm.

    <state>/containers/<sandbox>/pod/
        hosts hostname resolv.conf
        shm/                          a tmpfs

They are made before the sandbox is, and go with its directory; what is mounted is unmounted before.
"""

from __future__ import annotations

import os
from typing import Any

from gcsagent.agent import overlay
from gcsagent.agent.calls import Caller
from gcsagent.agent.oci.check_namespaces import mapped_root
from gcsagent.agent.oci.look import invalid
from gcsagent.agent.pods import files
from protocol import checks
from protocol.pods import PodFiles, PodNamespace, Sandbox

HOSTS, HOSTNAME, RESOLV_CONF, SHM = "hosts", "hostname", "resolv.conf", "shm"
LOCALHOST = "127.0.0.1"
_WITH = {
    HOSTS: PodNamespace.NETWORK,
    RESOLV_CONF: PodNamespace.NETWORK,
    HOSTNAME: PodNamespace.UTS,
    SHM: PodNamespace.IPC,
}
_TARGETS = {name: f"/etc/{name}" for name in (HOSTS, HOSTNAME, RESOLV_CONF)} | {SHM: "/dev/shm"}

Json = dict[str, Any]


def directory_of(containers: str, sandbox: str) -> str:
    return os.path.join(containers, sandbox, "pod")


def names_of(spec: Json) -> tuple[str, str]:
    """The pod's host and domain name. Raises INVALID_ARGUMENT for what cannot be written into hosts."""
    hostname, domainname = spec.get("hostname") or os.uname().nodename, spec.get("domainname") or ""
    for field, name in (("spec.hostname", hostname), ("spec.domainname", domainname)):
        problem = checks.host_name(name) if name else None
        if problem is not None:
            raise invalid(field, f"{name!r} {problem}; it is to stand in the pod's hosts")
    return hostname, domainname


async def make(caller: Caller, directory: str, sandbox: Sandbox, spec: Json) -> None:
    """Raises RpcError or OSError."""
    os.mkdir(directory, mode=0o711)
    if sandbox.files is not PodFiles.NONE:
        _write_files(directory, sandbox, spec)
    if sandbox.shm_bytes:
        shm = os.path.join(directory, SHM)
        os.mkdir(shm)
        uid, gid = mapped_root(spec) or (0, 0)
        options = f"nosuid,nodev,noexec,mode=1777,uid={uid},gid={gid},size={sandbox.shm_bytes}"
        await overlay.run(caller, ["mount", "-t", "tmpfs", "-o", options, "shm", shm], "mount /dev/shm")


def _write_files(directory: str, sandbox: Sandbox, spec: Json) -> None:
    hostname, domainname = names_of(spec)
    owner = mapped_root(spec) or (0, 0)
    texts = {
        HOSTS: files.hosts(hostname, domainname, sandbox.address or LOCALHOST, sandbox.hosts),
        HOSTNAME: f"{hostname}\n",
        RESOLV_CONF: files.resolv_conf(sandbox.dns),
    }
    for name, text in texts.items():
        if text:
            path = os.path.join(directory, name)
            with open(path, "w", encoding="ascii") as file:
                file.write(text)
            os.chmod(path, 0o644)
            os.chown(path, *owner)


async def unmake(caller: Caller, directory: str) -> None:
    """Raises RpcError when it stays in use."""
    await overlay.unmount_path(caller, os.path.join(directory, SHM), "unmount the pod's /dev/shm")


def mount(spec: Json, directory: str, how: PodFiles, share: tuple[PodNamespace, ...]) -> None:
    """Binds into a container what is there and belongs to what it shares.

    A mount of the caller's own in the same place stays; but for a tmpfs on /dev/shm, which every spec has.
    """
    mounts = list(spec.get("mounts") or ())
    taken = {os.path.normpath(each["destination"]) for each in mounts if not _is_own_shm(each)}
    for name, target in _TARGETS.items():
        source = os.path.join(directory, name)
        if _WITH[name] not in share or target in taken or not os.path.exists(source):
            continue
        mounts = [each for each in mounts if os.path.normpath(each["destination"]) != target]
        access = "rw" if name == SHM else how.value
        mounts.append(
            {
                "destination": target,
                "type": "bind",
                "source": source,
                "options": ["bind", access, "nosuid", "nodev", "noexec"],
            }
        )
    spec["mounts"] = mounts


def _is_own_shm(each: Json) -> bool:
    return os.path.normpath(each["destination"]) == _TARGETS[SHM] and each.get("type") == "tmpfs"
