"""Logging side-cars, asked for by annotations of the OCI spec: one container's output is another's to read.

``io.microsoft.bmc.logging.pipelocation`` names a pair of fifos, ``LOCATION-stdout`` and
``LOCATION-stderr``. The container that has it writes its output there. The one that beside it has
``io.microsoft.bmc.logging.isLoggingSideCarContainer`` = ``true`` gets both as descriptors 3 and 4, open for
reading and writing, so that neither container's end is felt by the other. Who comes first makes the fifos,
and the last to be deleted takes them along (:mod:`gcsagent.agent.fifos`).
"""

from __future__ import annotations

import os
from typing import Any

from gcsagent.agent.fifo import Fifo
from protocol import checks
from protocol.dataclass import dataclass, field, replace
from protocol.errors import Code, RpcError
from protocol.types import Stdio, StreamMode, StreamSpec

LOCATION = "io.microsoft.bmc.logging.pipelocation"
SIDE_CAR = "io.microsoft.bmc.logging.isLoggingSideCarContainer"


@dataclass(frozen=True, slots=True)
class Piping:
    """What init's streams are to be; the fifos it inherits beside them, by name: ``fd3``, ``fd4``.

    ``fields`` says, for errors, which argument a fifo's path came from.
    """

    stdio: Stdio
    inherited: dict[str, Fifo] = field(default_factory=dict)
    fields: dict[str, str] = field(default_factory=dict)


def plan(spec: dict[str, Any], stdio: Stdio, directory: str) -> Piping:
    """What the annotations of ``spec`` make of ``stdio``. A bare name is a location in ``directory``, which
    is made if need be. Raises INVALID_ARGUMENT naming the annotation, OSError."""
    annotations = spec.get("annotations")
    annotations = annotations if isinstance(annotations, dict) else {}
    is_side_car = annotations.get(SIDE_CAR, "false")
    if is_side_car not in ("true", "false"):
        raise _invalid(SIDE_CAR, "must be 'true' or 'false'")
    location = annotations.get(LOCATION)
    if location is None:
        if is_side_car == "true":
            raise _invalid(SIDE_CAR, f"needs {LOCATION}: which pipes is it to read?")
        return Piping(stdio)
    base = _base(location, directory)
    if stdio.terminal:
        raise _invalid(LOCATION, "cannot be given to a process with a terminal")
    out, err = f"{base}-stdout", f"{base}-stderr"
    if is_side_car == "true":
        inherited = {"fd3": Fifo(out), "fd4": Fifo(err)}
        return Piping(stdio, inherited, dict.fromkeys(inherited, _field(LOCATION)))
    if any(each.mode is not StreamMode.NULL for each in (stdio.stdout, stdio.stderr)):
        raise _invalid(LOCATION, "says where output goes: leave stdio.stdout and stdio.stderr null")
    pipes = (StreamSpec(StreamMode.FIFO, path=path) for path in (out, err))
    stdio = replace(stdio, stdout=next(pipes), stderr=next(pipes))
    return Piping(stdio, fields=dict.fromkeys(("stdout", "stderr"), _field(LOCATION)))


def _base(location: Any, directory: str) -> str:
    if not isinstance(location, str):
        raise _invalid(LOCATION, "must be a string")
    parent, slash, suffix = location.rpartition("/")
    problem = checks.identifier(suffix)
    if problem is not None:
        raise _invalid(LOCATION, f"must end in a plain name, the pipes' own: {suffix!r} {problem}")
    if not slash:
        os.makedirs(directory, mode=0o711, exist_ok=True)
        return os.path.join(directory, suffix)
    if not parent.startswith("/") or os.path.normpath(parent) != parent or checks.absolute_path(location):
        raise _invalid(LOCATION, "must be a plain name, or one behind an absolute path without '.' and '..'")
    return location


def _field(annotation: str) -> str:
    return f"spec.annotations[{annotation}]"


def _invalid(annotation: str, problem: str) -> RpcError:
    where = _field(annotation)
    return RpcError(Code.INVALID_ARGUMENT, f"{where}: {problem}", field=where)
