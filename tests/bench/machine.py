"""What the figures were taken on."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path


def facts() -> dict[str, str]:
    """Machine, kernel, Python, runc, the tree: in the order they are told."""
    return {
        "CPU": f"{os.cpu_count()} x {_cpu()}",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / (1 << 30):.0f} GiB",
        "Linux": platform.release(),
        "Python": platform.python_version(),
        "runc": _said("runc", "--version").splitlines()[0].removeprefix("runc version "),
        "C library": " ".join(platform.libc_ver()),
        "load before": f"{os.getloadavg()[0]:.2f}",
        "tree": _said("git", "-c", "safe.directory=*", "describe", "--always", "--dirty").strip(),
    }


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "?")


def _said(*command: str) -> str:
    """What a program prints, or why it does not."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"? ({error})"
    return done.stdout or "?"
