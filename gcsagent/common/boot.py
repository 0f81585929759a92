"""The stages of a guest's boot: told on the console as they are reached, and kept for agent.info.

    gcs-boot: STAGE UPTIME              (seconds since the kernel started, by CLOCK_BOOTTIME)
    gcs-boot: FAILED STAGE: REASON

initramfs/init begins both; supervisor and agent go on with them here. The launcher follows the console
(gcsagent.host.vm.console). What each stage means: protocol/SPEC.md, Boot stages.
"""

from __future__ import annotations

import os
import time

STAGES_FILE = "boot-stages"
"""In the state directory: lines ``STAGE UPTIME``, in the order in which they were reached."""

_told: set[str] = set()
"""By this process, also where they cannot be kept."""


def reached(stage: str, state: str) -> None:
    """Tells that ``stage`` has been passed and keeps it in the directory ``state``.

    A restarted agent's stages are no part of the boot: what is kept there is not told again.
    """
    if stage in _told or any(name == stage for name, _ in stages(state)):
        return
    _told.add(stage)
    uptime = f"{time.clock_gettime(time.CLOCK_BOOTTIME):.3f}"
    _say(f"gcs-boot: {stage} {uptime}")
    try:
        with open(os.path.join(state, STAGES_FILE), "a", encoding="ascii") as file:
            file.write(f"{stage} {uptime}\n")
    except OSError:
        return


def failed(stage: str, reason: str) -> None:
    """Tells why the boot ends here."""
    _say(f"gcs-boot: FAILED {stage}: {reason}")


def stages(state: str) -> list[tuple[str, float]]:
    """Every stage so far, with the uptime in seconds; none outside a guest."""
    try:
        with open(os.path.join(state, STAGES_FILE), encoding="ascii", errors="replace") as file:
            lines = [line.split() for line in file]
    except OSError:
        return []
    return [(line[0], float(line[1])) for line in lines if len(line) == 2 and _is_uptime(line[1])]


def _is_uptime(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()


def _say(line: str) -> None:
    try:
        os.write(2, (line.replace("\n", " ") + "\n").encode())
    except OSError:
        return
