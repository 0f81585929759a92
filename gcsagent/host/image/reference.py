"""PATH[:TAG], and which of the images in a file that means."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gcsagent.host.image.documents import ARCHITECTURE, OS, Descriptor
from gcsagent.host.image.errors import Ambiguous, NoFile, NotFound, Unsupported

TRANSPORTS = ("oci:", "oci-archive:", "docker-archive:")
"""As skopeo and podman write them; what a file is, it says itself."""

_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Reference:
    path: Path
    tag: str = ""


def parse(text: str) -> Reference:
    """The longest beginning of ``text`` that is there is the path. Raises NoFile."""
    for transport in TRANSPORTS:
        if not Path(text).exists():
            text = text.removeprefix(transport)
    path, tag = text, ""
    while True:
        if path and Path(path).exists():
            return Reference(Path(path), tag)
        path, colon, last = path.rpartition(":")
        if not colon:
            path = text.partition(":")[0]
            raise NoFile(f"{path}: no such directory or file; give PATH or PATH:TAG of an image")
        tag = f"{last}:{tag}" if tag else last


def answers_to(names: Iterable[str], tag: str) -> bool:
    """A tag, or the whole name of an image; ``app:1`` is ``example/app:1``, too."""
    return any(name == tag or name.endswith((f":{tag}", f"/{tag}")) for name in names)


def choose(entries: Sequence[tuple[tuple[str, ...], str]], tag: str, where: str) -> list[int]:
    """Which of ``entries``, each with its names and its identity, ``tag`` means: those of one name.

    Without a tag the only one, else the one that is ``latest``. Raises NotFound, Ambiguous.
    """
    if not entries:
        raise NotFound(f"{where} holds no image")
    known = sorted({name for names, _ in entries for name in names})
    listed = ", ".join(known[:_SHOWN]) or "none has a name"
    if tag:
        found = [number for number, (names, _) in enumerate(entries) if answers_to(names, tag)]
        if not found:
            raise NotFound(f"{where} has no image {tag!r}; there are: {listed}")
    else:
        found = list(range(len(entries)))
        named = [number for number in found if answers_to(entries[number][0], "latest")]
        if len({names for names, _ in entries}) > 1 and named:
            found = named
    groups = {entries[number][0] for number in found}
    if len(groups) > 1 and len({entries[number][1] for number in found}) > 1:
        raise Ambiguous(f"{where} has several images; give {where}:TAG, one of: {listed}")
    return found


def of_platform(entries: Sequence[Descriptor], where: str) -> Descriptor:
    """The one for this machine. Raises Unsupported, Ambiguous."""
    wanted = f"{OS}/{ARCHITECTURE}"
    fitting = [each for each in entries if each.platform == wanted]
    fitting += [each for each in entries if each.platform in (f"{wanted}/v1", "")]
    if not fitting:
        there = ", ".join(sorted({each.platform for each in entries})[:_SHOWN])
        raise Unsupported(f"{where} has no image for {wanted}; it has: {there or 'none'}")
    if not fitting[0].platform and len({each.digest for each in fitting}) > 1:
        raise Ambiguous(f"{where} has {len(fitting)} images without names or platforms; nothing tells which")
    return fitting[0]
