"""What supervisor and agent hold, as the kernel has it.

The guest's python3 gets this file's source; it must not import anything of ours.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys


def children(pid: int) -> list[int]:
    found = []
    for task in os.listdir(f"/proc/{pid}/task"):
        with (
            contextlib.suppress(FileNotFoundError, ProcessLookupError),
            open(f"/proc/{pid}/task/{task}/children") as file,
        ):
            found += [int(word) for word in file.read().split()]  # a thread that closes a pipe is soon gone
    return found


def _lines(path: str) -> list[str]:
    with open(path, errors="replace") as file:
        return file.read().splitlines()


def _state(pid: int) -> str:
    try:
        return _lines(f"/proc/{pid}/stat")[0].rpartition(")")[2].split()[0]
    except OSError:
        return ""


def _memory(pid: int) -> int:
    """Of PSS what is anonymous or shared memory (proc_pid_smaps_rollup): pages of files come and go with
    whatever else of Python runs on the machine."""
    wanted = ("Pss_Anon:", "Pss_Shmem:")
    return sum(
        int(line.split()[1]) for line in _lines(f"/proc/{pid}/smaps_rollup") if line.startswith(wanted)
    )


def _entries(top: str) -> int:
    """Files and directories below ``top``, not those of file systems mounted there."""
    if not os.path.isdir(top):
        return 0
    count, own = 0, os.stat(top).st_dev
    for parent, directories, files in os.walk(top):
        directories[:] = [name for name in directories if os.lstat(f"{parent}/{name}").st_dev == own]
        count += len(directories) + len(files)
    return count


def agent_of(supervisor: int) -> int:
    for pid in children(supervisor):
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            if b"gcsagent.agent" in file.read():
                return pid
    raise ProcessLookupError("there is no agent just now")


def sample(supervisor: int, state: str, cgroups: list[str]) -> dict[str, int]:
    """Raises OSError while the agent is being replaced. Memory is in KiB."""
    agent, found = agent_of(supervisor), {}
    for name, pid in (("supervisor", supervisor), ("agent", agent)):
        found[f"{name}_kib"] = _memory(pid)
        found[f"{name}_fds"] = len(os.listdir(f"/proc/{pid}/fd"))
        found[f"{name}_threads"] = len(os.listdir(f"/proc/{pid}/task"))
    found["zombies"] = sum(_state(pid) == "Z" for pid in children(supervisor))
    found["mounts"] = sum(state in line for line in _lines(f"/proc/{supervisor}/mounts"))
    found["cgroups"] = sum(_entries_of_kind(top) for top in cgroups)
    found["state_entries"] = _entries(state) - _entries(f"{state}/requests")
    return found


def _entries_of_kind(top: str) -> int:
    return sum(len(directories) for _, directories, _ in os.walk(top))


if __name__ == "__main__":
    print(json.dumps(sample(int(sys.argv[1]), sys.argv[2], sys.argv[3:])))
