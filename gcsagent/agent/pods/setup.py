"""A container's way into its pod, in the order in which create takes it: planned, made, looked after."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gcsagent.agent.oci.check_namespaces import sysctl_kind
from gcsagent.agent.oci.look import invalid
from gcsagent.agent.pods import cgroup, join, shared
from gcsagent.agent.pods.pod import ALONE, Membership, Role
from protocol.errors import Code, RpcError
from protocol.families.container import CreateContainer
from protocol.pods import PodFiles, PodMember, PodNamespace
from protocol.types import Status

if TYPE_CHECKING:
    from gcsagent.agent.container import Container
    from gcsagent.agent.registry import Registry

Json = dict[str, Any]


def plan(registry: Registry, params: CreateContainer) -> Role:
    """What the container is going to be. Raises RpcError; nothing has been made."""
    if params.pod is None:
        return ALONE if params.sandbox is None else Role(sandbox=params.sandbox)
    if params.sandbox is not None:
        raise invalid("pod", "a container is a sandbox or in the pod of another; give 'sandbox' or 'pod'")
    return Role(member=_membership(registry, params.pod))


def _membership(registry: Registry, pod: PodMember) -> Membership:
    sandbox = sandbox_of(registry, pod.sandbox, "pod.sandbox")
    sandbox.check("add to the pod of")
    share = tuple(dict.fromkeys(pod.share))
    try:
        found = join.identities(sandbox.init.pid, share)
    except OSError as error:  # it has ended, and nobody has been told yet
        raise join.gone(sandbox.ident, {}) from error
    sandbox.init.signal(0)  # it lives, so that these were its
    return Membership(sandbox.ident, share, found)


def sandbox_of(registry: Registry, ident: str, field: str) -> Container:
    """Raises NOT_FOUND or FAILED_PRECONDITION."""
    sandbox = registry.get(ident)
    if sandbox.role.sandbox is None:
        raise RpcError(
            Code.FAILED_PRECONDITION,
            f"{field}: container {ident} is not the sandbox of a pod; create one with 'sandbox'",
            field=field,
        )
    return sandbox


def adapt(registry: Registry, role: Role, spec: Json) -> None:
    """Before its names become sysctls. Raises INVALID_ARGUMENT."""
    if role.sandbox is not None:
        shared.names_of(spec)
    if role.member is None:
        return
    shares = {kind.value for kind in role.member.share}
    for key in (spec.get("linux") or {}).get("sysctl") or {}:
        if sysctl_kind(key) in shares:
            raise invalid(f"spec.linux.sysctl.{key}", "is the whole pod's; give it to the sandbox")
    if PodNamespace.USER in role.member.share:
        _share_mappings(registry.get(role.member.sandbox), spec)
    join.rewrite(spec, registry.get(role.member.sandbox).init.pid, role.member.share)


def _share_mappings(sandbox: Container, spec: Json) -> None:
    """A runtime that joins a user namespace wants to be told of its mappings, too."""
    linux = sandbox.directory.read("config.json")["linux"]
    if not any(entry == {"type": "user"} for entry in linux["namespaces"]):
        raise invalid("pod.share", f"sandbox {sandbox.ident} has no user namespace of its own to share")
    ours = spec["linux"] = dict(spec.get("linux") or {})
    ours["uidMappings"], ours["gidMappings"] = linux["uidMappings"], linux["gidMappings"]


def explain(registry: Registry, container: Container, error: RpcError) -> RpcError:
    """Why the runtime could not make it: ``error``, unless its sandbox has ended."""
    member = container.role.member
    sandbox = registry.containers.get(member.sandbox) if member is not None else None
    if sandbox is None or sandbox.init.alive:
        return error
    return join.gone(sandbox.ident, error.details)


async def prepare(registry: Registry, container: Container, spec: Json) -> None:
    """Makes what a pod shares, for its sandbox, and binds it into the container. Raises RpcError, OSError."""
    role = container.role
    if role is ALONE:
        return
    ident = role.member.sandbox if role.member is not None else container.ident
    directory = shared.directory_of(registry.directory, ident)
    if role.sandbox is not None:
        await shared.make(registry.caller, directory, role.sandbox, spec)
    options = registry.get(ident).role.sandbox
    how = PodFiles.NONE if options is None else options.files
    share = role.member.share if role.member is not None else tuple(PodNamespace)
    shared.mount(spec, directory, how, share)


def settle(container: Container) -> None:
    """The runtime has made it. Raises RpcError when it is not what it was to be."""
    if container.role.member is not None:
        join.check_joined(container.role.member.sandbox, container.init.pid, container.role.member.namespaces)
    options = container.role.sandbox
    if options is not None and cgroup.given(options.limits):
        cgroup.apply(container.cgroup.parent(), options.limits)


def limit_again(container: Container) -> None:
    """An earlier agent may have been killed while it changed the limits of a pod."""
    options = container.role.sandbox
    if options is not None and container.status is not Status.CREATING:
        cgroup.apply_again(container.cgroup.parent(), options.limits)
