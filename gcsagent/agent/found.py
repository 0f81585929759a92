"""What there is in the directory that an earlier agent kept of a container."""

from __future__ import annotations

import os
import shutil
from typing import Any

from gcsagent.agent.process_dir import VERSION, read_json


def process_directories(path: str) -> list[str]:
    """Directories of processes below a container's: live, being started, ended.

    One without its document was killed before anything had been asked for: it is removed.
    """
    live = [name for name in os.listdir(path) if name.isdigit() or name.startswith(".new-")]
    ended = os.path.join(path, "exited")
    retired = os.listdir(ended) if os.path.isdir(ended) else []
    found = live + [os.path.join("exited", name) for name in retired]
    whole = [where for where in found if os.path.exists(os.path.join(path, where, "process.json"))]
    for where in set(found) - set(whole):
        if where.startswith(".new-"):
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
