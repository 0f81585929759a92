"""Records of pods: containers that share namespaces and a cgroup with a sandbox container."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from protocol import checks
from protocol.dataclass import dataclass


class PodNamespace(StrEnum):
    """What a container can share with its pod's sandbox, by the OCI runtime spec's names."""

    NETWORK = "network"
    """Interfaces, addresses and ports; with it `/etc/hosts` and `/etc/resolv.conf`."""
    IPC = "ipc"
    """System V IPC and POSIX message queues; with it `/dev/shm`."""
    UTS = "uts"
    """Host and domain name; with it `/etc/hostname`."""
    PID = "pid"
    """Processes: they see each other, and all end when the sandbox's init does."""
    USER = "user"
    """User and group ids: the sandbox's own user namespace, with its mappings."""


@dataclass(frozen=True, slots=True)
class PodMember:
    """The pod a container is put into, and what it shares there."""

    sandbox: checks.Id
    """The pod's sandbox: a container that was created with ``sandbox`` and is created or running."""
    share: tuple[PodNamespace, ...] = (PodNamespace.NETWORK, PodNamespace.IPC, PodNamespace.UTS)
    """Of its namespaces, those that are the sandbox's."""


class PodFiles(StrEnum):
    """How a pod's hosts, hostname and resolv.conf appear in its containers."""

    READ_ONLY = "ro"
    """Mounted read-only."""
    WRITABLE = "rw"
    """Mounted so that each container may change them, for all."""
    NONE = "none"
    """Not at all: each container has what its root file system has."""


@dataclass(frozen=True, slots=True)
class HostsEntry:
    """A line of hosts(5)."""

    address: checks.IpAddress
    """IPv4 or IPv6."""
    names: Annotated[tuple[checks.HostName, ...], checks.AtMost(32, 1)]
    """Of one in the pod's own domain the short name is added."""


@dataclass(frozen=True, slots=True)
class Dns:
    """What resolv.conf(5) says. With nothing of it the pod has no such file."""

    nameservers: Annotated[tuple[checks.IpAddress, ...], checks.AtMost(3)] = ()
    """Asked in this order; resolvers look at three."""
    search: Annotated[tuple[checks.SearchDomain, ...], checks.AtMost(32)] = ()
    """Domains that short names are looked up in."""
    options: Annotated[tuple[checks.DnsOption, ...], checks.AtMost(32)] = ()
    """As `ndots:5`."""


@dataclass(frozen=True, slots=True)
class PodLimits:
    """What all containers of a pod may use together; what is absent is not limited."""

    memory_bytes: Annotated[int, checks.Limit(1 << 20, 1 << 50)] | None = None
    """Memory."""
    cpus: checks.Cpus | None = None
    """CPU time, in CPUs: 0.5 is half of one."""
    cpu_shares: Annotated[int, checks.Between(2, 1 << 18)] | None = None
    """The pod's part of the CPU time when there is not enough; 1024 is the usual one."""
    pids: Annotated[int, checks.Limit(1, 1 << 22)] | None = None
    """Processes and threads."""


@dataclass(frozen=True, slots=True)
class Sandbox:
    """Makes a container the sandbox of a pod. Its host and domain name, ``spec``'s, are the pod's."""

    address: checks.IpAddress | None = None
    """The pod's own, for its name in hosts; absent, 127.0.0.1."""
    hosts: Annotated[tuple[HostsEntry, ...], checks.AtMost(1024)] = ()
    """Further lines of hosts."""
    dns: Dns = Dns()
    """For resolv.conf."""
    files: PodFiles = PodFiles.READ_ONLY
    """How these files appear in the pod's containers."""
    shm_bytes: Annotated[int, checks.Between(0, 1 << 50)] = 64 << 20
    """Size of the `/dev/shm` they share; 0: each has what its own spec says."""
    limits: PodLimits = PodLimits()
    """For the pod's cgroup."""
