"""A container's root directory as a descriptor: as its processes see it, or what is left of it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from typing import TYPE_CHECKING

from protocol.checks import INIT
from protocol.dataclass import dataclass
from protocol.errors import Code, RpcError

if TYPE_CHECKING:  # the agent has no use for tarfile
    from gcsagent.agent.container import Container
    from gcsagent.agent.process import Process
    from gcsagent.tarball.attributes import IdMap

_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_ALL_IDS = (0, 0, (1 << 32) - 1)


@dataclass(frozen=True, slots=True)
class Root:
    """``fd`` is the holder's; ``mountinfo`` tells of the mounts below it, ``uids`` and ``gids`` who owns."""

    fd: int
    mountinfo: str = "/proc/self/mountinfo"
    uids: IdMap = ()
    gids: IdMap = ()


def open_root(container: Container | None) -> Root:
    """The guest's own for None. With a live init, what that sees, mounts included. Raises RpcError."""
    if container is None:
        return Root(os.open("/", _DIRECTORY))
    init = container.processes.get(INIT)
    if init is not None and init.alive and init.pid:
        with contextlib.suppress(OSError):
            return _of_process(init)
    try:
        return Root(
            os.open(container.root, _DIRECTORY),
            uids=_mapped(container, "uid"),
            gids=_mapped(container, "gid"),
        )
    except OSError as error:
        raise RpcError(
            Code.FAILED_PRECONDITION,
            f"container {container.ident} has no root directory any more: {container.root}: {error.strerror}",
            errno=error.errno or 0,
        ) from error


def _of_process(init: Process) -> Root:
    """Raises OSError when it has ended: by its pidfd, so that the pid was its own when it was used."""
    proc = f"/proc/{init.pid}"
    root = os.open(f"{proc}/root", _DIRECTORY)
    try:
        uids, gids = _read_map(f"{proc}/uid_map"), _read_map(f"{proc}/gid_map")
        if init.pidfd >= 0:
            signal.pidfd_send_signal(init.pidfd, 0)
    except BaseException:
        os.close(root)
        raise
    return Root(root, f"{proc}/mountinfo", uids, gids)


def _read_map(path: str) -> IdMap:
    """user_namespaces(7)."""
    with open(path) as file:
        lines = [tuple(map(int, line.split())) for line in file]
    found = tuple((inner, out, count) for inner, out, count in lines)
    return () if found == (_ALL_IDS,) else found


def _mapped(container: Container, kind: str) -> IdMap:
    """The mappings its config.json asks for."""
    try:
        with open(os.path.join(container.directory.path, "config.json")) as file:
            found = (json.load(file).get("linux") or {}).get(f"{kind}Mappings") or ()
        return tuple((each["containerID"], each["hostID"], each["size"]) for each in found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ()
