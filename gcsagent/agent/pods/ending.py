"""The end of a pod: its containers first, its sandbox last, and then what they shared."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING

from gcsagent.agent.pods import shared
from gcsagent.agent.pods.pod import members
from protocol.checks import INIT
from protocol.errors import Code, RpcError
from protocol.types import Status

if TYPE_CHECKING:
    from gcsagent.agent.cgroups import Cgroup
    from gcsagent.agent.container import Container
    from gcsagent.agent.registry import Registry


def check(containers: Iterable[Container], sandbox: Container, *, force: bool) -> None:
    """Whether it may be deleted. Raises FAILED_PRECONDITION naming the containers of its pod."""
    there = members(containers, sandbox.ident) if sandbox.status is not Status.DELETING else []
    if there and not force:
        raise _refused(sandbox, there, "has containers in its pod", "delete them first, or force it")
    beginning = [each for each in there if each.status is Status.CREATING]
    if beginning:
        raise _refused(sandbox, beginning, "has containers that are being created or started", "try it again")


def _refused(sandbox: Container, those: list[Container], what: str, hint: str) -> RpcError:
    names = sorted(each.ident for each in those)
    return RpcError(
        Code.FAILED_PRECONDITION,
        f"cannot delete container {sandbox.ident}: it {what}: {', '.join(names)}; {hint}",
        containers=names,
    )


async def delete_members(registry: Registry, sandbox: Container, seconds: float) -> None:
    """All at once. Raises RpcError when one resists, the others being gone."""
    there = members(registry.containers.values(), sandbox.ident)
    results = await asyncio.gather(
        *(registry.delete(each, seconds) for each in there), return_exceptions=True
    )
    for result in results:
        if isinstance(result, BaseException):
            raise result


def cgroups(registry: Registry, container: Container) -> list[Cgroup]:
    """What is to be removed with it, innermost first: its own, and the pod's with a sandbox."""
    found, pod = [container.cgroup], container.cgroup.parent()
    if container.role.sandbox is not None and registry.cgroup_tree.holds(pod.path):
        found.append(pod)
    return found


async def unmount(registry: Registry, sandbox: Container) -> None:
    """What it shared. Raises RpcError when it stays in use."""
    await shared.unmake(registry.caller, shared.directory_of(registry.directory, sandbox.ident))


def deleted(registry: Registry, container: Container) -> None:
    """Its sandbox may have waited for that."""
    if container.role.member is not None:
        sandbox = registry.containers.get(container.role.member.sandbox)
        if sandbox is not None and INIT in sandbox.processes:
            registry.check_auto_delete(sandbox, sandbox.init)
