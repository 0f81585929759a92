"""The agent's own part of the cgroup hierarchy: one root, and below it only what containers have there.

A container's cgroup is ``ROOT/ID``, or where its spec says, below the same root. No two overlap: killing or
removing one container's whole tree must never reach another's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from gcsagent.agent.cgroups import Cgroup, CgroupMounts
from gcsagent.agent.process_dir import ContainerDir


class CgroupTree:
    def __init__(self, mounts: CgroupMounts, root: str) -> None:
        self._mounts, self.root = mounts, root

    def at(self, name: str) -> Cgroup:
        """``name`` is relative to the root."""
        return Cgroup(self._mounts, f"{self.root}/{name}")

    def name_of(self, cgroup: Cgroup) -> str:
        """What :meth:`at` would make it of."""
        return cgroup.path.removeprefix(f"{self.root}/")

    def holds(self, path: str) -> bool:
        """Whether ``path`` is below the root, and not by way of ``..``."""
        inside = path.removeprefix(f"{self.root}/")
        return inside != path and bool(inside) and not {"", ".", ".."} & set(inside.split("/"))

    def restored(self, path: str) -> Cgroup:
        """What an earlier agent wrote down. Raises ValueError for what it cannot have been."""
        if not self.holds(path):
            raise ValueError(f"the cgroup {path!r} is not below {self.root}")
        return Cgroup(self._mounts, path)

    def recovered(self, container: ContainerDir) -> Cgroup | None:
        """The cgroup of a container whose state is broken, by whichever of its files can still be read."""
        for name, path in (("container.json", ("cgroup",)), ("config.json", ("linux", "cgroupsPath"))):
            try:
                found: Any = container.read(name)
                for key in path:
                    found = found[key]
                return self.restored(found)
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                continue
        return None

    def unknown(self, known: Collection[str]) -> Iterator[Cgroup]:
        """The topmost cgroups that are neither of ``known`` nor above or below one of them."""
        yield from self._unknown(self.root, known)

    def _unknown(self, path: str, known: Collection[str]) -> Iterator[Cgroup]:
        for name in sorted(Cgroup(self._mounts, path).children()):
            child = f"{path}/{name}"
            if child in known:
                continue
            if any(each.startswith(f"{child}/") for each in known):
                yield from self._unknown(child, known)
            else:
                yield Cgroup(self._mounts, child)

    def prune(self, path: str, known: Collection[str]) -> None:
        """Removes the parents of ``path`` that are empty now and above nothing of ``known``."""
        parent = path.rpartition("/")[0]
        while self.holds(parent) and not any(each.startswith(f"{parent}/") for each in known):
            Cgroup(self._mounts, parent).remove_empty()
            parent = parent.rpartition("/")[0]

    def remove_root(self) -> None:
        """When the last container is gone."""
        Cgroup(self._mounts, self.root).remove()


def overlap(one: str, other: str) -> bool:
    """Whether one of the two paths is the other, or above it."""
    return f"{one}/".startswith(f"{other}/") or f"{other}/".startswith(f"{one}/")
