"""Opens the network namespaces that requests are about."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

from gcsagent.agent.network.tools import Namespace
from gcsagent.agent.pods.shared import directory_of
from gcsagent.agent.registry import Registry
from protocol.checks import INIT
from protocol.errors import Code, RpcError

ACTION = "configure the network of"


@contextlib.contextmanager
def guest() -> Iterator[Namespace]:
    fd = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield Namespace(fd)
    finally:
        os.close(fd)


def check_own(registry: Registry) -> None:
    """Raises FAILED_PRECONDITION: nobody's machine is to lose its network to an agent under development."""
    if not registry.own_network:
        raise RpcError(
            Code.FAILED_PRECONDITION,
            "this agent does not run as a guest's (gcsagent --guest), and was not told that the network"
            " namespace it is in is its own (--own-network): it changes those of containers only",
        )


@contextlib.contextmanager
def of_container(registry: Registry, ident: str) -> Iterator[Namespace]:
    """The namespace of a container that has one of its own.

    Raises RpcError: NOT_FOUND, FAILED_PRECONDITION; that it has ended, also for a ProcessLookupError in the
    block.
    """
    container = registry.get(ident)
    container.check(ACTION)
    init = container.processes.get(INIT)
    try:
        if init is None or init.pidfd < 0:
            raise ProcessLookupError
        fd, pidfd = os.open(f"/proc/{init.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC), -1
        try:
            pidfd = os.dup(init.pidfd)
            signal.pidfd_send_signal(pidfd, 0)  # it was its pid when the namespace was opened
            if os.fstat(fd).st_ino == os.stat("/proc/self/ns/net").st_ino:
                raise RpcError(
                    Code.FAILED_PRECONDITION,
                    f"container {ident} has no network namespace of its own, it is in the guest's; leave"
                    " `container` out to configure that",
                    field="container",
                )
            is_pod = container.role.sandbox is not None
            yield Namespace(fd, init.pid, directory_of(registry.directory, ident) if is_pod else "", pidfd)
        finally:
            os.close(fd)
            if pidfd >= 0:
                os.close(pidfd)
    except (ProcessLookupError, FileNotFoundError) as error:
        raise RpcError(
            Code.FAILED_PRECONDITION, f"container {ident} has ended, and its network with it"
        ) from error
