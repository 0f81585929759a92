"""What a container is in a pod: its sandbox, or one of those that share with the sandbox."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from gcsagent.agent.cgroup_tree import overlap
from gcsagent.agent.oci.cgroup_path import FIELD
from gcsagent.agent.oci.look import invalid
from gcsagent.agent.pods.join import Identities
from protocol.dataclass import dataclass, field
from protocol.errors import Code, RpcError
from protocol.pods import PodNamespace, Sandbox
from protocol.schema import from_wire, to_wire

if TYPE_CHECKING:
    from gcsagent.agent.container import Container


@dataclass(frozen=True, slots=True)
class Membership:
    """``namespaces`` is what the sandbox's were known by when this container was to join them."""

    sandbox: str
    share: tuple[PodNamespace, ...]
    namespaces: Identities = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Role:
    """At most one of the two; neither: the container is in no pod."""

    sandbox: Sandbox | None = None
    member: Membership | None = None

    def document(self) -> dict[str, Any]:
        """What container.json says of it."""
        member = self.member
        return {
            "sandbox": None if self.sandbox is None else to_wire(self.sandbox),
            "member": None
            if member is None
            else {"sandbox": member.sandbox, "share": list(member.share), "namespaces": member.namespaces},
        }


ALONE = Role()


def read(document: dict[str, Any] | None) -> Role:
    """Raises what a broken document does: ValueError, KeyError, TypeError or SchemaError."""
    if document is None:
        return ALONE
    sandbox, member = document["sandbox"], document["member"]
    return Role(
        None if sandbox is None else from_wire(Sandbox, sandbox),
        None
        if member is None
        else Membership(
            str(member["sandbox"]),
            tuple(PodNamespace(kind) for kind in member["share"]),
            {str(kind): [int(part) for part in found] for kind, found in member["namespaces"].items()},
        ),
    )


def cgroup_of(sandbox: Container) -> str:
    """The path of its pod's cgroup: the one that its own is in."""
    return sandbox.cgroup.path.rpartition("/")[0]


def place(ident: str, wanted: str, role: Role, root: str, containers: Mapping[str, Container]) -> str:
    """A container's cgroup below ``root``, in its pod's; ``wanted`` may be empty. Raises INVALID_ARGUMENT."""
    if role.sandbox is not None:
        if wanted and "/" not in wanted:
            raise invalid(FIELD, f"{wanted!r} leaves no cgroup for the pod; give one with two levels")
        return wanted or f"{ident}/{ident}"
    if role.member is None:
        return wanted or ident
    pod = cgroup_of(containers[role.member.sandbox]).removeprefix(f"{root}/")
    if wanted and not wanted.startswith(f"{pod}/"):
        raise invalid(FIELD, f"{wanted!r} is not in the pod's cgroup, {pod}; put it there, or leave it out")
    return wanted or f"{pod}/{ident}"


def check_place(path: str, role: Role, containers: Iterable[Container]) -> None:
    """Raises FAILED_PRECONDITION for a cgroup that is above or below another's, or in another pod's."""
    mine = path.rpartition("/")[0] if role.sandbox is not None else path
    pod = role.member.sandbox if role.member is not None else ""
    for other in containers:
        theirs = (
            cgroup_of(other) if other.role.sandbox is not None and other.ident != pod else other.cgroup.path
        )
        if overlap(mine, theirs):
            raise RpcError(
                Code.FAILED_PRECONDITION,
                f"{FIELD}: {mine} and the cgroup of container {other.ident}, {theirs},"
                " are one or inside each other; give another path",
                field=FIELD,
            )


def members(containers: Iterable[Container], sandbox: str) -> list[Container]:
    """Those in its pod beside it."""
    return [
        each for each in containers if each.role.member is not None and each.role.member.sandbox == sandbox
    ]
