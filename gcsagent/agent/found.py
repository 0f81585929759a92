"""What there is in the directory that an earlier agent kept of a container."""

from __future__ import annotations

import os
import shutil
from typing import Any

from gcsagent.agent import changes
from gcsagent.agent.container import Container
from gcsagent.agent.journal import RequestMark
from gcsagent.agent.pods import pod
from gcsagent.agent.process_dir import VERSION, read_json
from gcsagent.agent.registry import Registry
from protocol.schema import SchemaError
from protocol.types import Status

BROKEN = (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, SchemaError)
"""What reading a state file that is missing, truncated or not ours can raise."""


def process_directories(path: str) -> list[str]:
    """Directories of processes below a container's: live, being started, ended.

    One without its document is removed: an agent was killed before it had asked for anything, or in the
    middle of removing it, which begins with the document.
    """
    live = [name for name in os.listdir(path) if name.isdigit() or name.startswith(".new-")]
    ended = os.path.join(path, "exited")
    retired = os.listdir(ended) if os.path.isdir(ended) else []
    found = live + [os.path.join("exited", name) for name in retired]
    whole = [where for where in found if os.path.exists(os.path.join(path, where, "process.json"))]
    for where in set(found) - set(whole):
        shutil.rmtree(os.path.join(path, where))
    return whole


def read_document(path: str) -> dict[str, Any]:
    """A state document. Raises ValueError for one that a newer agent has written."""
    document = read_json(path)
    if document["version"] > VERSION:
        raise ValueError(f"{os.path.basename(path)} has version {document['version']}, known is {VERSION}")
    return document


def slots(document: dict[str, Any]) -> list[int]:
    """Counter slots that a process's document names."""
    found = document.get("slots")
    lists = found.values() if isinstance(found, dict) else ()
    return [slot for entry in lists if isinstance(entry, list) for slot in entry if isinstance(slot, int)]


def fill(container: Container, document: dict[str, Any], registry: Registry) -> None:
    """The container as its container.json has it. Raises KeyError, TypeError or ValueError."""
    container.status = Status(document["status"])
    container.runtime = registry.runtimes.remembered(str(document["runtime"]))
    container.owns_pids = bool(document["owns_pids"])
    container.cgroup = registry.cgroup_tree.restored(str(document["cgroup"]))
    container.role = pod.read(document.get("pod"))
    container.root, container.auto_delete = str(document["root"]), bool(document["auto_delete"])
    container.create_request = mark(document.get("create_request"))
    container.start_request = mark(document.get("start_request"))
    container.delete_request = mark(document.get("delete_request"))
    container.freeze_request = mark(document.get("freeze_request"))
    container.change = changes.read(document.get("change"))
    container.io_limits = dict(document.get("io_limits", {}))
    container.checkpointing = document.get("checkpointing")
    container.restored_from = str(document.get("restored_from", ""))
    container.labels, container.created_at_ns = dict(document["labels"]), int(document["created_at_ns"])


def mark(document: Any) -> RequestMark | None:
    return None if document is None else RequestMark(str(document[0]), str(document[1]))
