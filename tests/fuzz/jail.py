"""Where hostile inputs are tried: a mount and a network namespace of their own, nothing but one directory
writable, no disk within reach."""

from __future__ import annotations

import os
from pathlib import Path

SCRIPT = """
set -e
mount --bind "$1" "$1"
mount -o remount,bind,ro /
for disk in /dev/[svx]d[a-z] /dev/nvme*n*; do
    if [ -b "$disk" ]; then mount --bind /dev/null "$disk"; fi
done
shift
exec "$@"
"""


def command(directory: Path, argv: list[str]) -> list[str]:
    """``argv`` in the jail, as root. ``/dev``, ``/proc``, ``/sys`` are those of the machine."""
    jail = [
        "unshare",
        "--mount",
        "--net",
        "--propagation",
        "private",
        "sh",
        "-c",
        SCRIPT,
        "jail",
        str(directory),
    ]
    return [*jail, *argv]


def environment(directory: Path) -> dict[str, str]:
    """Temporary files go where they may be written."""
    return {**os.environ, "TMPDIR": str(directory), "PYTHONDONTWRITEBYTECODE": "1"}
