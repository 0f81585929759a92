"""Where a copy goes and what it is called there, as ``cp`` and ``docker cp`` decide it."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass

from gcsagent.tarball.errors import ArchiveError, at, shown
from gcsagent.tarball.tree import Tree, split
from protocol.errors import Code


@dataclass(frozen=True, slots=True)
class Place:
    """``parts`` name a directory that is there; ``name`` is what the copy is called in it."""

    parts: list[str]
    name: str = ""


def for_contents(tree: Tree, path: str, *, make: bool) -> Place:
    """For an archive whose entries go below ``path``, which with ``make`` is made if its parent is there."""
    info = tree.look(path)
    if info is None and make:
        parent = _parent(tree, path)
        return Place(_made(tree, [*parent, split(path)[-1]]))
    if info is None:
        raise ArchiveError(Code.NOT_FOUND, f"{shown(path)}: no such directory", field="path")
    if not stat.S_ISDIR(info.st_mode):
        raise ArchiveError(Code.FAILED_PRECONDITION, f"{shown(path)} is no directory", field="path")
    return Place(split(path))


def for_copy(tree: Tree, path: str, name: str, *, is_directory: bool) -> Place:
    """For a copy of one thing called ``name`` to ``path``: into it, if that is a directory, else as it."""
    info = tree.look(path)
    if info is not None and stat.S_ISDIR(info.st_mode):
        return Place(split(path), name)
    if path.endswith(("/", "/.")) and not (info is None and is_directory):
        raise ArchiveError(
            Code.FAILED_PRECONDITION if info else Code.NOT_FOUND,
            f"{shown(path)}: {'is no directory' if info else 'no such directory'}",
            field="path",
        )
    if info is not None and is_directory:
        raise ArchiveError(
            Code.FAILED_PRECONDITION,
            f"{shown(path)} is there and is no directory: a directory cannot be copied over it",
            field="path",
        )
    if info is not None:  # over what a symlink leads to, not over the symlink
        parts = _real(tree, path)
        return Place(parts[:-1], parts[-1])
    return Place(_parent(tree, path), split(path)[-1])


def _real(tree: Tree, path: str) -> list[str]:
    try:
        fd, names = tree.trail(split(path))
    except OSError as error:
        raise at(path, error) from error
    os.close(fd)
    return names


def _parent(tree: Tree, path: str) -> list[str]:
    parts = split(path)
    above = parts[:-1]
    if not parts or parts[-1] == "..":
        raise ArchiveError(Code.NOT_FOUND, f"{shown(path)}: no such directory", field="path")
    info = tree.look("/".join(above))
    if info is None or not stat.S_ISDIR(info.st_mode):
        raise ArchiveError(
            Code.NOT_FOUND, f"{shown('/' + '/'.join(above))}: no such directory; make it first", field="path"
        )
    return above


def _made(tree: Tree, parts: list[str]) -> list[str]:
    try:
        os.close(tree.directory(parts, make=True))
    except OSError as error:
        raise at("/".join(parts), error) from error
    return parts
