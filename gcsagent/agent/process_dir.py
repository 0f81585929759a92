"""The state directory of one container, and in it one directory per process.

    <state>/containers/<container>/
        config.json          what the runtime was given; this directory is the bundle
        container.json       what the host asked for beside that
        init.pid
        <pid>/               a live process: process.json, and the pid file the runtime wrote
        exited/<process>/    one that has ended: pids are used again, process ids are the caller's
        exited/.deleted-<request>-<process>/   one being deleted: gone if that request's answer is stored,
                             else still there
        .new-<process>/      one that is being started; never outlives a failure
        pod/                 of a sandbox: what its pod shares (gcsagent.agent.pods.shared)
        upper/ work/ root/   with ``overlay``: the throw-away layer and where it is mounted

Files are written under another name and renamed, so that a reader finds all of one or none.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable
from typing import Any

from gcsagent.common.files import write_new

VERSION = 1
"""Of the files' layout; a reader refuses a newer one than it knows.

Code that is being tried (agent.upgrade) may have to give way to the code before it: until it is promoted it
writes the layout it found, and migrates nothing. There is nothing to migrate yet."""

DELETED = ".deleted-"

FEW = 32
"""Processes' directories that are removed at once."""

_FILES = ("process.json", "spec.json", "pid")
"""What a process's directory holds, but for what a killed agent or runtime left in it."""


class ContainerDir:
    def __init__(self, containers: str, container: str) -> None:
        self.path = os.path.join(containers, container)

    def create(self) -> None:
        """Raises FileExistsError when there is one by that name already."""
        os.mkdir(self.path, mode=0o711)
        os.mkdir(os.path.join(self.path, "exited"), mode=0o700)

    def write(self, name: str, document: dict[str, Any]) -> None:
        write_json(os.path.join(self.path, name), document)

    def read(self, name: str) -> dict[str, Any]:
        """Raises OSError or ValueError."""
        return read_json(os.path.join(self.path, name))

    def overlay_directories(self) -> tuple[str, str, str]:
        """upper, work and root, made if need be."""
        paths = tuple(os.path.join(self.path, name) for name in ("upper", "work", "root"))
        for path in paths:
            os.makedirs(path, mode=0o755, exist_ok=True)
        return paths[0], paths[1], paths[2]

    def begin(self, process: str, document: dict[str, Any]) -> str:
        """A directory for a process that is about to be started, under its temporary name."""
        path = os.path.join(self.path, f".new-{process}")
        os.mkdir(path, mode=0o700)
        try:
            write_json(os.path.join(path, "process.json"), document)
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise
        return path

    def settle(self, process: str, pid: int) -> None:
        """The process runs: its directory takes the pid's name. One left there by a dead pid gives way."""
        target = os.path.join(self.path, str(pid))
        remove_process(target)
        os.rename(os.path.join(self.path, f".new-{process}"), target)
        if process == "init":
            write_new(os.path.join(self.path, "init.pid"), b"%d" % pid)

    def update(self, pid: int, document: dict[str, Any]) -> None:
        write_json(os.path.join(self.path, str(pid), "process.json"), document)

    def retire(self, process: str, pid: int, document: dict[str, Any]) -> None:
        """The process has ended: its directory goes to ``exited/``, with how it ended."""
        source, target = os.path.join(self.path, str(pid)), os.path.join(self.path, "exited", process)
        write_json(os.path.join(source, "process.json"), document)
        os.rename(source, target)

    def discard(self, process: str, pid: int) -> None:
        """The process was never started, or is deleted; ``pid`` is 0 when it never had one."""
        names = [f".new-{process}", os.path.join("exited", process), *([str(pid)] if pid else [])]
        for name in names:
            if not name.isdigit() or self._is_of(name, process):
                remove_process(os.path.join(self.path, name))

    def _is_of(self, pid: str, process: str) -> bool:
        """Whether that directory is this process's, not one's that got its pid after it had ended."""
        try:
            return bool(self.read(os.path.join(pid, "process.json"))["process"] == process)
        except (OSError, ValueError, KeyError):
            return False

    def doom(self, process: str, request: str) -> str:
        """Takes an ended process aside, to be deleted with the answer that ``request`` is going to name.

        Returns where it is. Raises OSError.
        """
        target = os.path.join(self.path, "exited", f"{DELETED}{request}-{process}")
        os.rename(os.path.join(self.path, "exited", process), target)
        return target

    def settle_doomed(self, answered: Callable[[str], bool]) -> None:
        """What an agent was killed over: processes whose deletion has been answered go, others are back."""
        ended = os.path.join(self.path, "exited")
        for name in os.listdir(ended) if os.path.isdir(ended) else []:
            if name.startswith(DELETED):
                request, _, process = name.removeprefix(DELETED).partition("-")
                if not request or answered(request):
                    remove_process(os.path.join(ended, name))
                else:
                    os.rename(os.path.join(ended, name), os.path.join(ended, process))

    def move_to_trash(self, untold_after: int | None = None) -> str | None:
        """Takes it out of the way in one step; returns where it is now, None if it was not there.

        ``untold_after``: the number of the last event before the one that is going to tell of it.
        """
        trash = os.path.join(os.path.dirname(os.path.dirname(self.path)), "trash")
        os.makedirs(trash, mode=0o700, exist_ok=True)
        mark = "" if untold_after is None else f"+{untold_after}"
        target = os.path.join(trash, f"{os.path.basename(self.path)}.{time.time_ns()}{mark}")
        try:
            os.rename(self.path, target)
        except FileNotFoundError:
            return None
        return target


def untold_deletion(name: str) -> tuple[str, int] | None:
    """Of a directory in the trash: its container, and the last event before the one that tells of it."""
    whole, plus, after = name.rpartition("+")
    return (whole.rpartition(".")[0], int(after)) if plus and after.isdecimal() else None


def empty_few(path: str) -> bool:
    """Empties a container's directory if it has no layer, no pod and few processes; whether it did."""
    try:
        names = os.listdir(path)
        if {"upper", "pod"} & set(names) or len(os.listdir(os.path.join(path, "exited"))) > FEW:
            return False
        for name in names:
            each = os.path.join(path, name)
            shutil.rmtree(each) if os.path.isdir(each) and not os.path.islink(each) else os.unlink(each)
    except OSError:
        return False
    return True


def remove_process(path: str) -> None:
    """A process's directory, if it is there; what it is not expected to hold takes longer."""
    if not os.path.lexists(path):
        return
    for name in _FILES:
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(path, name))
    try:
        os.rmdir(path)
    except OSError:
        shutil.rmtree(path, ignore_errors=True)


def write_json(path: str, document: dict[str, Any]) -> None:
    temporary = f"{path}.tmp"
    try:
        write_new(temporary, json.dumps(document).encode("ascii"))
        os.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def read_json(path: str) -> dict[str, Any]:
    with open(path, "rb", buffering=0) as file:
        document = json.loads(file.read())
    if not isinstance(document, dict):
        raise ValueError(f"{path} does not hold an object")
    return document
